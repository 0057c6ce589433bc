"""Fixtures of the benchmarks: `compare` measures ours beside what a user would otherwise run.

pytest benchmarks -k attention            # a table, and benchmarks/results/<device>.json and .svg
pytest benchmarks --smoke                 # tiny sizes, one round, nothing written
pytest benchmarks/gpu --results DIR       # the GPU suites, results elsewhere
"""

import itertools
import time
from pathlib import Path

import pytest
import torch

from benchmarks import machine, report
from dllm_kernels import _library

GPU_FOLDER = Path(__file__).parent / "gpu"
L2_MULTIPLE = 3  # rotating inputs cover the last-level cache of the GPU this many times
BUSY_CYCLES = 400_000  # of the GPU before each launch: hides the time that Python takes to launch


def pytest_addoption(parser):
    group = parser.getgroup("dllm benchmarks")
    group.addoption("--smoke", action="store_true", help="tiny sizes, one round each; writes no results")
    group.addoption("--results", type=Path, help="folder for the results (default: benchmarks/results)")
    group.addoption("--peer", action="append", default=[], metavar="NAME=DIR", help="a checkout to run too")
    group.addoption("--seconds", type=float, default=2.0, help="time to spend on one comparison")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU; timed with CUDA events")
    config.option.benchmark_quiet = True  # our table stands in for the one of pytest-benchmark
    config.stash[report.ROWS] = []
    machine.commit()  # read now: the checkout may change while benchmarks run


def pytest_collection_modifyitems(config, items):
    """benchmarks/gpu needs a GPU; its smoke run makes do with the CPU, to see that the code still runs."""
    reason = _library.cuda_unavailable()
    for item in items:
        if GPU_FOLDER not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if reason is None:
            item.add_marker(pytest.mark.benchmark(timer=CudaTime))
        elif not config.getoption("--smoke"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config):
    report.finish(terminalreporter, config)


@pytest.fixture
def smoke(request) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture
def device(request) -> str:
    """Where the tensors of a benchmark live."""
    return "cuda" if _on_gpu(request) else "cpu"


def _on_gpu(request) -> bool:
    return request.node.get_closest_marker("gpu") is not None and _library.cuda_unavailable() is None


@pytest.fixture
def pick(smoke):
    """pick(full, tiny): the size to run."""
    return lambda full, tiny: tiny if smoke else full


@pytest.fixture
def compare(benchmark, request, smoke):
    """compare(ours, baselines, inputs=..., flops=..., bytes=..., tolerance=..., ...) measures and records.

    ours, baselines[name]: called as f(*inputs()); they take turns within every round. On a GPU `inputs` is
    called until its tensors cover the last-level cache several times, and the sets rotate.
    flops: useful ones, of visible pairs only; dense_flops: of the whole rectangle; bytes: read and written.
    tolerance: atol and rtol with which every baseline's result must equal ours.
    size: the case's place on the scaling plot. memory: also records the peak memory of every function.
    rounds: how many, where as many as fit would take too long.
    """
    on_gpu = _on_gpu(request)
    clock = CudaTime if on_gpu else time.perf_counter

    def compare(
        ours,
        baselines,
        *,
        inputs=tuple,
        flops=None,
        dense_flops=None,
        bytes=None,
        tolerance=None,
        size=None,
        memory=False,
        rounds=None,
    ):
        rotation = itertools.cycle(_input_sets(inputs, on_gpu and not smoke))
        seconds = {name: [] for name in baselines}

        def turn(function) -> float:
            arguments = next(rotation)
            start = _start(clock)
            function(*arguments)
            return clock() - start

        def baselines_then_ours():
            for name, function in baselines.items():
                seconds[name].append(turn(function))
            arguments = next(rotation)
            if on_gpu:
                torch.cuda._sleep(BUSY_CYCLES)
            return arguments, {}

        _check_equal(ours, baselines, next(rotation), tolerance)
        turns = 1 if smoke else rounds
        if turns is None:
            once = turn(ours) + sum(turn(function) for function in baselines.values())
            turns = min(200, max(5, int(request.config.getoption("--seconds") / once)))
        benchmark.pedantic(ours, setup=baselines_then_ours, rounds=turns)
        if not benchmark.enabled:
            return
        measured = report.Row(
            suite=Path(request.node.path).stem.removeprefix("test_"),
            case=request.node.name.removeprefix("test_"),
            device=torch.cuda.get_device_name() if on_gpu else "cpu",
            ours=list(benchmark.stats.stats.data),
            baselines={name: values[-turns:] for name, values in seconds.items()},
            work={"flops": flops, "dense_flops": dense_flops, "bytes": bytes},
            size=size,
            memory=_peak_memory({"ours": ours, **baselines}, next(rotation), on_gpu) if memory else {},
        )
        benchmark.extra_info.update(measured.summary())
        request.config.stash[report.ROWS].append(measured)

    return compare


class CudaTime:
    """A point on the GPU's time line; the difference of two is in seconds."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: "CudaTime") -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


def _peak_memory(functions: dict, arguments: tuple, on_gpu: bool) -> dict[str, int | None]:
    where = "cuda" if on_gpu else "cpu"
    return {
        name: machine.peak_memory(lambda function=function: function(*arguments), where)
        for name, function in functions.items()
    }


def _start(clock):
    if clock is CudaTime:
        torch.cuda._sleep(BUSY_CYCLES)
    return clock()


def _input_sets(inputs, rotate: bool) -> list[tuple]:
    first = inputs()
    if not rotate:
        return [first]
    size = sum(value.nbytes for value in first if isinstance(value, torch.Tensor))
    wanted = L2_MULTIPLE * torch.cuda.get_device_properties().L2_cache_size
    return [first, *(inputs() for _ in range(min(31, wanted // max(size, 1))))]


def _check_equal(ours, baselines, arguments, tolerance) -> None:
    result = ours(*arguments)
    for name, function in baselines.items():
        other = function(*arguments)
        if tolerance is not None:
            torch.testing.assert_close(
                other, result, **tolerance, check_dtype=False, msg=lambda m, name=name: f"{name}: {m}"
            )
