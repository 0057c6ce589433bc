"""Builds the emulator with the CUDA kernels in it and puts its operators in place of the CPU's.

`torch.ops.dllm_kernels_simt` has the schemas of `torch.ops.dllm_kernels`; what the CUDA bindings implement
runs there on CPU tensors.
"""

import contextlib
import ctypes
import fcntl
import functools
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from dllm_kernels import _library  # noqa: F401  (loads the operators)

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "simt"


def _tool(name: str) -> str:
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert path, f"{name} is missing: pip install {name}"
    return path


@functools.cache
def _build_errors() -> str:
    """Compiles what changed; once per process, also where it fails. Processes take turns."""
    configure = [
        _tool("cmake"),
        *("-S", str(Path(__file__).parent), "-B", str(BUILD), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DDLLM_TORCH_ROOT={Path(torch.__file__).parent}",
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for step in (configure, [_tool("cmake"), "--build", str(BUILD)]):
            done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                return done.stdout
    return ""


@functools.cache
def _load() -> ctypes.CDLL:
    path = str(BUILD / "_simt.so")
    schemas = torch.library.Library("dllm_kernels_simt", "DEF")
    for name in _operators("dllm_kernels"):
        schemas.define(str(_overload("dllm_kernels", name)._schema).removeprefix("dllm_kernels::"))
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(path)
    loaded.schemas = schemas  # lives as long as the library
    loaded.simt_switches.restype = ctypes.c_uint64
    return loaded


def library() -> ctypes.CDLL:
    """Built, loaded, with the operators registered."""
    if errors := _build_errors():
        raise RuntimeError(f"the emulator does not build:\n{errors}")
    return _load()


def _operators(namespace: str) -> list[str]:
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted(name for space, name in names if space == namespace)


def _overload(namespace: str, name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, namespace), name).default


def emulated() -> list[str]:
    """Operators that the CUDA bindings implement."""
    library()
    return [
        name
        for name in _operators("dllm_kernels_simt")
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"dllm_kernels_simt::{name}", "CPU")
    ]


@contextlib.contextmanager
def in_place_of_cpu(order: int = 0, capability: int = 8) -> Iterator[None]:
    """Inside, `torch.ops.dllm_kernels` on CPU tensors are the CUDA kernels on the emulator, and tensors are
    allocated between pages that must not be touched.

    order: in which order threads and CTAs run: 0 forward, 1 backward, else shuffled with this seed.
    capability: the major compute capability that the device claims, 9 for the kernels of Hopper.
    """
    library().simt_set_order(order)
    library().simt_set_capability(capability)
    library().simt_guard_tensors(True)
    with torch.library._scoped_library("dllm_kernels", "IMPL") as scope:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name in emulated():
                scope.impl(name, _overload("dllm_kernels_simt", name), "CPU", allow_override=True)
        try:
            yield
        finally:
            library().simt_guard_tensors(False)
