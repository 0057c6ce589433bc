"""Runs the kernels of wrappers.cu and wrappers_sm90.cu, on a GPU and on the emulator."""

import ctypes
import functools
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import simt

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"": ["wrappers.cu"], "_sm90": ["wrappers_sm90.cu", "../../csrc/cuda/sm90/tensor_map.cpp"]}


@functools.cache
def _compiled_for_the_gpu(family: str) -> ctypes.CDLL:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("nvcc, which compiles the kernels of simt for the GPU, was not found")
    library = Path(tempfile.mkdtemp()) / "wrappers.so"
    architecture = "90a" if family else "".join(map(str, torch.cuda.get_device_capability()))
    only = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"  # -arch=sm_90a adds a plain 90
    command = f"{nvcc} -std=c++20 --expt-relaxed-constexpr {only} -shared -Xcompiler=-fPIC"
    files = ["-I", ROOT / "csrc", "-o", library, *(ROOT / "simt" / name for name in SOURCES[family])]
    subprocess.run([*command.split(), *map(str, files)], check=True)
    return ctypes.CDLL(str(library))


def run_wrapper(backend: str, name: str, values: np.ndarray, shape, dtype, order=0, family="") -> np.ndarray:
    """What kernel `name` writes for `values`; results that it does not write are −1 or NaN.

    backend: "cuda" or "simt". family: "_sm90" for the kernels of Hopper.
    """
    emulated = backend == "simt"
    library = simt.library() if emulated else _compiled_for_the_gpu(family)
    run = getattr(library, f"run_wrapper{family}")
    run.restype = ctypes.c_char_p
    device = "cpu" if emulated else "cuda"
    size = math.prod(shape) * np.dtype(dtype).itemsize
    results = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
    arguments = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).reshape(-1)).to(device)
    if emulated:
        library.simt_set_order(order)
    else:
        torch.cuda.synchronize()
    pointers = ctypes.c_void_p(arguments.data_ptr()), ctypes.c_void_p(results.data_ptr())
    problem = run(name.encode(), *pointers).decode()
    assert problem == ""
    return results.cpu().numpy().view(dtype).reshape(shape)
