"""CUDA kernels, on a GPU and without one.

A test that takes the fixture `gpu` runs twice: "cuda" on a GPU, skipped without one, and "simt" on the
emulator of tests/simt, anywhere. Parameters too large for the emulator carry the mark `hardware`, those for
the kernels of Hopper the mark `hopper`. Tests without the fixture need a GPU. DLLM_REQUIRE_GPU=1 forbids
skipping, and leaves out the emulator.
"""

import functools
import os
import zlib
from pathlib import Path

import placement
import pytest
import torch
from wrapper_kernels import run_wrapper

from dllm_kernels import _library


def pytest_collection_modifyitems(config, items):
    reason = _library.cuda_unavailable()
    if reason and os.environ.get("DLLM_REQUIRE_GPU"):
        pytest.exit(f"DLLM_REQUIRE_GPU is set, but {reason}", returncode=1)
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    too_large = {item for item in here if _is_emulated(item) and item.get_closest_marker("hardware")}
    items[:] = [item for item in items if item not in too_large]
    config.hook.pytest_deselected(items=list(too_large))
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
