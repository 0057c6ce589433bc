"""The machine that benchmarks run on: what it is, how fast it can be, how much memory a call takes."""

import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dllm_kernels
from dllm_kernels import _library  # noqa: F401  (loads the operators)

ROOT = Path(__file__).parents[1]
RESET_PEAK = "5"  # to /proc/self/clear_refs: the peak of resident memory starts again from here


def about(device: str) -> dict:
    """Return the machine and versions that the figures depend on."""
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.ops.dllm_kernels.isa_active(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dllm_kernels": dllm_kernels.__version__,
        "commit": commit(),
    }


@functools.cache
def commit() -> str:
    """Return the short hash, with a + when files other than results differ from it; or what DLLM_COMMIT says.

    A package that is installed elsewhere is no commit of this checkout: its version is said.
    """
    if os.environ.get("DLLM_COMMIT"):
        return os.environ["DLLM_COMMIT"]
    if not Path(dllm_kernels.__file__).is_relative_to(ROOT):
        return f"of the package {dllm_kernels.__version__}"
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"], capture_output=True, text=True
    )
    return head.stdout.strip() + "+" * bool(changed.stdout.strip()) if head.returncode == 0 else "unknown"


def peaks(device: str) -> dict[str, float]:
    """Return what `device`, as in `about`, reaches: "flops" and "bytes" per second."""
    where = "cpu" if device == "cpu" else "cuda"
    return {"flops": peak_flops(where), "bytes": peak_bandwidth(where)}


@functools.cache
def peak_flops(device: str) -> float:
    """Floating-point operations per second of torch's square product: float32 on a CPU, bfloat16 on a GPU."""
    size, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b), device)


@functools.cache
def peak_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Bytes that a call has allocated at its peak beyond what stood before; None where nobody counts them."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would be used again without being seen
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _status_bytes(status, "VmRSS")
    function()
    return _status_bytes(status, "VmHWM") - before


def _status_bytes(status: Path, name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", status.read_text())[1])


def _best_seconds(function: Callable[[], object], device: str) -> float:
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()
