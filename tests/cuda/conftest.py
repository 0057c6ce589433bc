"""CUDA kernels, on a GPU and without one.

A test that takes the fixture `gpu` runs twice: "cuda" on a GPU, skipped without one, and "simt" on the
emulator of simt, anywhere. Parameters too large for the emulator carry the mark `hardware`, those for
the kernels of Hopper the mark `hopper`. Tests without the fixture need a GPU. DLLM_REQUIRE_GPU=1 forbids
skipping, and leaves out the emulator.

Tests that capture CUDA graphs carry the mark `graph`. They are deselected under
PYTORCH_NO_CUDA_MEMORY_CACHING=1, with which torch refuses to allocate while it captures.
"""

import functools
import os
import zlib
from pathlib import Path

import pytest
import torch

from dllm_kernels import _library
from simt import placement
from simt.wrapper_kernels import run_wrapper


def pytest_collection_modifyitems(config, items):
    reason = _library.cuda_unavailable()
    if reason and os.environ.get("DLLM_REQUIRE_GPU"):
        pytest.exit(f"DLLM_REQUIRE_GPU is set, but {reason}", returncode=1)
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    uncached = os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1"
    left_out = {
        item
        for item in here
        if (_is_emulated(item) and item.get_closest_marker("hardware"))
        or (uncached and item.get_closest_marker("graph"))
    }
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
    if reason is None:
        return
    for item in here:
        if not _is_emulated(item):
            item.add_marker(pytest.mark.skip(reason=reason))


def _is_emulated(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return any(str(parameters.get(fixture)).startswith("simt") for fixture in ("gpu", "wrapper"))


def _skip_unless_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels of Hopper need compute capability 9.0")


@pytest.fixture(params=["cuda"] if os.environ.get("DLLM_REQUIRE_GPU") else ["cuda", "simt"])
def gpu(request):
    """`gpu(function, *arguments)` is function(*arguments) by the CUDA kernels, for arguments and results on
    the CPU; what it changes in place is changed. `gpu.device` and `with gpu.kernels():` serve tests that keep
    tensors there."""
    hopper = request.node.get_closest_marker("hopper")
    if request.param == "cuda":
        if hopper:
            _skip_unless_hopper()
        return placement.OnCuda()
    name = zlib.crc32(request.node.nodeid.encode())
    return placement.OnEmulator(order=name if name % 4 > 1 else name % 4, capability=9 if hopper else 8)


@pytest.fixture(params=["cuda"] if os.environ.get("DLLM_REQUIRE_GPU") else ["cuda", "simt", "simt backward"])
def wrapper(request):
    """`wrapper(name, values, shape, dtype)`: results of a kernel that calls one of our wrappers of PTX."""
    backend, _, order = request.param.partition(" ")
    hopper = request.node.get_closest_marker("hopper")
    if hopper and backend == "cuda":
        _skip_unless_hopper()
    return functools.partial(
        run_wrapper, backend, order=int(order == "backward"), family="_sm90" if hopper else ""
    )
