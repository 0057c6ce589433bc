"""Load the compiled libraries; everything that calls `torch.ops.dllm_kernels` imports this first.

`_C` (schemas and CPU kernels) is loaded always, `_C_cuda` with a CUDA build of torch, the pybind11
module `_host` by the first call of `host()`. The environment variable `DLLM_ISA` (baseline, avx2, avx512)
forces the instruction set of the CPU kernels.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(__file__).parent / "lib"
REBUILD = "`pip install --no-build-isolation .` in the source tree (or `make build`)"


def build_info() -> dict:
    """Return the build record: compiler, isas, nvcc, cuda_archs, cuda_left_out (why there is no CUDA), the
    version of cutlass, cutlass_left_out."""
    path = FOLDER / "build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def cuda_unavailable() -> str | None:
    """Return why operators cannot run on CUDA tensors here, with the remedy; None if they can."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is a CPU build: install a CUDA build of torch"
    if not _path("_C_cuda").exists():
        reason = build_info().get("cuda_left_out") or f"{_path('_C_cuda')} is missing"
        return f"the CUDA library was not built ({reason}): with nvcc on PATH, {REBUILD}"
    if not torch.cuda.is_available():
        return "torch sees no GPU: check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
    return None


def host() -> ModuleType:
    """Return the pybind11 module of host-side data structures; it is built per Python version."""
    try:
        return importlib.import_module("dllm_kernels.lib._host")
    except ImportError as error:
        raise ImportError(
            f"{FOLDER} has no _host for this Python ({error}): build it with {REBUILD}"
        ) from error


def _path(name: str) -> Path:
    return FOLDER / f"{name}.so"


def _load_library(name: str) -> None:
    try:
        torch.ops.load_library(str(_path(name)))
    except OSError as error:
        if not _path(name).exists():
            raise ImportError(f"{_path(name)} is missing: build it with {REBUILD}") from None
        what = f"{_path(name)} does not load with torch {torch.__version__}: {error}"
        raise ImportError(f"{what}. Rebuild it with {REBUILD}") from error


def _load() -> None:
    _load_library("_C")
    if error := torch.ops.dllm_kernels.isa_error():
        raise ImportError(error)
    if torch.version.cuda and _path("_C_cuda").exists():
        _load_library("_C_cuda")


_load()
