"""Fixtures of the benchmarks: `compare` measures ours beside what a user would otherwise run.

pytest benchmarks -k attention            # a table, and benchmarks/results/<device>.json, .md, .svg, .html
pytest benchmarks -m smoke                # tiny sizes, one round, nothing written; the same as --smoke
pytest benchmarks -m gpu --results DIR    # the GPU suites, results elsewhere
pytest benchmarks -k peers --peer fast-dllm=DIR --peer llama.cpp=BINARY
"""

import itertools
import re
import time
from pathlib import Path

import pytest
import torch

from benchmarks import machine, peers, report, results
from benchmarks.self_timed import SelfTimed
from dllm_kernels import _library

GPU_FOLDER = Path(__file__).parent / "gpu"
L2_MULTIPLE = 3  # rotating inputs cover the last-level cache of the GPU this many times
PEERS = pytest.StashKey[dict]()
BUSY_CYCLES = 400_000  # of the GPU before each launch: hides the time that Python takes to launch


def pytest_addoption(parser):
    group = parser.getgroup("dllm benchmarks")
    group.addoption("--smoke", action="store_true", help="tiny sizes, one round each; saves no results")
    group.addoption("--results", type=Path, help="folder for the results (default: benchmarks/results)")
    group.addoption("--no-save", action="store_true", help="leave benchmarks/results as it is")
    group.addoption("--json", type=Path, metavar="FILE", help="write the rows of this run alone")
    group.addoption(
        "--report", type=Path, metavar="FILE", help="write the HTML page (default: beside the JSON)"
    )
    group.addoption(
        "--peer", action="append", default=[], metavar="NAME=DIR",
        help="a checkout to run too: llada, fast-dllm, dllm; llama.cpp=PROGRAM",
    )  # fmt: skip
    group.addoption(
        "--peer-python", action="append", default=[], metavar="NAME=PYTHON",
        help="the interpreter that runs the checkout (default: this one)",
    )  # fmt: skip
    group.addoption("--seconds", type=float, default=2.0, help="time to spend on one comparison")


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: runs on a CPU; timed with the process's clock")
    config.addinivalue_line("markers", "gpu: needs a GPU; timed with CUDA events")
    config.addinivalue_line("markers", "smoke: every benchmark; selecting it turns --smoke on")
    expression = config.option.markexpr
    if re.search(r"\bnot\s+smoke\b", expression):
        raise pytest.UsageError(
            f"-m {expression!r}: every benchmark has a smoke run; allowed: smoke, cpu, gpu"
        )
    if re.search(r"\bsmoke\b", expression):
        config.option.smoke = True
    folder = config.getoption("--results")
    if folder and folder.exists() and not folder.is_dir():
        raise pytest.UsageError(f"--results {folder}: a file; expected the folder of the results")
    config.option.benchmark_quiet = True  # our table stands in for the one of pytest-benchmark
    config.stash[report.ROWS] = []
    config.stash[report.EXISTING] = {}
    try:
        config.stash[PEERS] = peers.named(config.getoption("--peer"), config.getoption("--peer-python"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    machine.commit()  # read now: the checkout may change while benchmarks run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """benchmarks/gpu needs a GPU; its smoke run makes do with the CPU, to see that the code still runs."""
    items = [item for item in items if Path(__file__).parent in item.path.parents]
    whole_files = not any("::" in argument for argument in config.args)
    reason = _library.cuda_unavailable()
    for item in items:
        on_gpu = GPU_FOLDER in item.path.parents
        if whole_files:
            config.stash[report.EXISTING].setdefault((on_gpu, _suite(item)), set()).add(_case(item))
        item.add_marker(pytest.mark.smoke)
        item.add_marker(pytest.mark.gpu if on_gpu else pytest.mark.cpu)
        if not on_gpu:
            continue
        if reason is None:
            item.add_marker(pytest.mark.benchmark(timer=CudaTime))
        elif not config.getoption("--smoke"):
            item.add_marker(pytest.mark.skip(reason=reason))


def _suite(item) -> str:
    return item.path.stem.removeprefix("test_")


def _case(item) -> str:
    return item.name.removeprefix("test_")


def pytest_terminal_summary(terminalreporter, config):
    report.finish(terminalreporter, config)


@pytest.fixture
def smoke(request) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture
def named_peers(request) -> dict[str, peers.Peer]:
    """Return the peers that --peer names."""
    return request.config.stash[PEERS]


@pytest.fixture
def peer(named_peers):
    """peer(name): the one that --peer names; the test is skipped where it names none."""

    def peer(name: str) -> peers.Peer:
        if name not in named_peers:
            what = "PROGRAM" if name == "llama.cpp" else "DIR"
            pytest.skip(f"{peers.TITLES[name]} is run where --peer {name}={what} names it")
        return named_peers[name]

    return peer


@pytest.fixture
def device(request) -> str:
    """Return the device of a benchmark's tensors."""
    return "cuda" if _on_gpu(request) else "cpu"


def _on_gpu(request) -> bool:
    return request.node.get_closest_marker("gpu") is not None and _library.cuda_unavailable() is None


def _stands_in(request) -> bool:
    """Return whether a GPU benchmark runs on a CPU, in its smoke run: it is a result of neither device."""
    return request.node.get_closest_marker("gpu") is not None and not _on_gpu(request)


@pytest.fixture
def pick(smoke):
    """pick(full, tiny): the size to run."""
    return lambda full, tiny: tiny if smoke else full


@pytest.fixture
def compare(benchmark, request, smoke):
    """compare(ours, baselines, inputs=..., title=..., flops=..., tolerance=..., ...) measures and records.

    ours, baselines[name]: called as f(*inputs()); they take turns within every round. On a GPU `inputs` is
    called until its tensors cover the last-level cache of the GPU several times, and the sets rotate.
    title: what the row says it measures (default: the name of the test).
    flops: useful ones, of visible pairs only; dense_flops: of the whole rectangle; bytes: read and written.
    tolerance: atol and rtol with which every baseline's result must equal ours.
    length, batch: the case's place on a scaling plot. memory: also records the peak memory of every function.
    tokens: a function from a result to its completion tokens, up to and without the end token.
    rounds: how many, where as many as fit would take too long. steps: a call's, whose time is wanted.
    """
    on_gpu = _on_gpu(request)
    clock = CudaTime if on_gpu else time.perf_counter

    def compare(
        ours,
        baselines,
        *,
        inputs=tuple,
        title=None,
        flops=None,
        dense_flops=None,
        bytes=None,
        tolerance=None,
        length=None,
        batch=None,
        memory=False,
        tokens=None,
        rounds=None,
        steps=1,
    ):
        rotation = itertools.cycle(_input_sets(inputs, on_gpu and not smoke))
        seconds = {name: [] for name in baselines}

        def turn(function) -> float:
            arguments = next(rotation)
            if isinstance(function, SelfTimed):
                return function(*arguments)
            start = _start(clock)
            function(*arguments)
            return (clock() - start) / steps

        def baselines_then_ours():
            for name, function in baselines.items():
                seconds[name].append(turn(function))
            arguments = next(rotation)
            if on_gpu:
                torch.cuda._sleep(BUSY_CYCLES)
            return arguments, {}

        functions = {name: f for name, f in baselines.items() if not isinstance(f, SelfTimed)}
        outputs = _equal_outputs(ours, functions, next(rotation), tolerance)
        turns = 1 if smoke else rounds
        if turns is None:
            once = turn(ours) + sum(turn(function) for function in baselines.values())
            turns = min(200, max(5, int(request.config.getoption("--seconds") / once)))
        benchmark.pedantic(ours, setup=baselines_then_ours, rounds=turns)
        if not benchmark.enabled or _stands_in(request):
            return
        scales = [(axis, size) for axis, size in (("length", length), ("batch", batch)) if size is not None]
        measured = results.Row(
            suite=_suite(request.node),
            case=_case(request.node),
            device=torch.cuda.get_device_name() if on_gpu else "cpu",
            ours=[value / steps for value in benchmark.stats.stats.data],
            baselines={name: values[-turns:] for name, values in seconds.items()},
            work={"flops": flops, "dense_flops": dense_flops, "bytes": bytes},
            title=title,
            scale=scales[0] if scales else None,
            memory=_peak_memory({"ours": ours, **functions}, next(rotation), on_gpu) if memory else {},
            tokens={name: tokens(output) for name, output in outputs.items()} if tokens else {},
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


def _equal_outputs(ours, baselines, arguments, tolerance) -> dict:
    """Return what each function gives, by name, after checking baselines against "ours"."""
    outputs = {"ours": ours(*arguments)}
    for name, function in baselines.items():
        outputs[name] = function(*arguments)
        if tolerance is not None:
            torch.testing.assert_close(
                outputs[name],
                outputs["ours"],
                **tolerance,
                check_dtype=False,
                msg=lambda m, name=name: f"{name}: {m}",
            )
    return outputs
