"""Launches that are recorded and flags that are read late, with a stand-in for what torch does on a GPU."""

import contextlib
import inspect

import pytest
import torch
from torch.torch_version import TorchVersion

from dllm_kernels.sampling import graphs
from dllm_kernels.sampling.graphs import WARM_UP, Flags, Launches, NotRecorded
from dllm_kernels.sampling.slots import length_bucket

CUDA = torch.device("cuda", 0)


class Stream:
    def __init__(self):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class Graph:
    replays, recorded = 0, False

    def replay(self):
        self.replays += 1

    def pool(self):
        if not self.recorded:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return "pool"


class Cuda:
    """torch.cuda as far as recording goes: streams, and a recording that restores neither the current stream
    nor the allocator where it fails. allocating: pools that allocations go to; ends_first: only until a
    recording that fails raises. held: the pool, once for each who keeps it alive."""

    ends_first = False

    def __init__(self, fails: BaseException | None = None):
        self.CUDAGraph, self.Stream = Graph, Stream
        self.current, self.fails, self.graphs, self.recording = Stream(), fails, [], False
        self.first = self.current
        self.allocating, self.held = [], []
        self.parameters = inspect.signature(torch.cuda.graph)

    def device(self, device):
        return contextlib.nullcontext()

    def current_device(self):
        return 0

    def end_allocating(self, device, pool):
        if pool not in self.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocating.remove(pool)

    def release(self, device, pool):
        self.held.remove(pool)

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    @staticmethod
    def graph_pool_handle():
        return "pool"

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, *arguments, **options):
        bound = self.parameters.bind(*arguments, **options).arguments
        self.graphs.append(bound)
        before, self.current, self.recording = self.current, bound["stream"], True
        self.allocating.append(bound["pool"])
        self.held.append(bound["pool"])
        try:
            yield
        finally:
            self.recording = False
            if self.fails is None or self.ends_first:
                self.end_allocating(0, bound["pool"])
            if self.fails is not None:
                raise self.fails
            bound["cuda_graph"].recorded = True
            self.current = before


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(graphs.torch, "cuda", fake)
    monkeypatch.setattr(graphs, "_STREAMS", {})
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocating, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", fake.release, raising=False)
    return fake


def test_a_function_is_warmed_up_and_recorded_once(cuda):
    launches, calls = Launches(CUDA), []
    for _ in range(2):
        launches.record("step", lambda: calls.append((cuda.recording, cuda.current)))
    for _ in range(3):
        launches.launch("step")
    assert calls == [(False, launches.stream)] * WARM_UP + [(True, launches.stream)]
    (graph,) = cuda.graphs
    assert graph["cuda_graph"].replays == 3
    assert graph["pool"] == launches.pool and graph["stream"] is launches.stream
    assert launches.stream.waited_for == [cuda.first] and cuda.first.waited_for == [launches.stream]
    assert cuda.current is cuda.first


def test_recordings_share_a_pool_and_a_stream(cuda):
    launches = Launches(CUDA)
    for name in ("forward", "commit"):
        launches.record(name, lambda: None)
    assert Launches(CUDA).stream is launches.stream
    first, second = cuda.graphs
    assert first["pool"] == second["pool"] and first["stream"] is second["stream"]
    assert first["cuda_graph"] is not second["cuda_graph"]


ERRORS = [KeyboardInterrupt(), ValueError("no head"), torch.OutOfMemoryError("full")]


@pytest.mark.parametrize("calls_before", [0, WARM_UP])
@pytest.mark.parametrize("error", ERRORS)
def test_a_function_that_raises_leaves_nothing(cuda, error, calls_before):
    """In its warm-up, and while it is recorded."""
    launches, calls = Launches(CUDA), []

    def run():
        calls.append(None)
        if len(calls) == calls_before + 1:
            raise error

    with pytest.raises(type(error)):
        launches.record("step", run)
    assert not launches.recorded and cuda.current is cuda.first
    assert cuda.first.waited_for == [launches.stream]
    launches.record("step", run)
    launches.launch("step")


def test_what_a_graph_cannot_hold_is_said_and_leaves_nothing(cuda):
    launches = Launches(CUDA)
    cuda.fails = RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.raises(NotRecorded, match=r"capturing$"):
        launches.record("step", lambda: None)
    assert not launches.recorded and cuda.current is cuda.first


WAITED = RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    "version, ends_first, held", [("2.11", False, 1), ("2.13", True, 1), ("2.14", True, 2)]
)
@pytest.mark.parametrize("error", [None, WAITED, *ERRORS])
def test_a_recording_that_is_broken_off_gives_its_pool_back(
    cuda, monkeypatch, error, version, ends_first, held
):
    """Once, where torch does not do so itself; and what went wrong first is what is said."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    launches, cuda.ends_first = Launches(CUDA), ends_first
    launches.record("commit", lambda: None)
    cuda.fails, calls = torch.AcceleratorError("operation failed due to a previous error", 901), []

    def run():
        calls.append(None)
        if error is not None and len(calls) > WARM_UP:
            raise error

    with pytest.raises(NotRecorded if error in (None, WAITED) else type(error)) as raised:
        launches.record("step", run)
    assert str(raised.value) == str(error or cuda.fails)
    assert not cuda.allocating and cuda.held == ["pool"] * held and cuda.current is cuda.first


def test_on_a_cpu_a_launch_is_a_call():
    launches, calls = Launches(torch.device("cpu")), []
    launches.record("step", lambda: calls.append(None))
    assert not calls
    launches.launch("step")
    assert len(calls) == 1


def test_flags_on_a_cpu_are_there_at_once():
    tensor = torch.zeros(2)
    flags = Flags(tensor, in_flight=2)
    assert flags.look() is None
    for number in range(3):
        tensor.fill_(number)
        flags.note()
        seen, values = flags.look()
        assert seen == number and values.tolist() == [number, number]


def test_length_buckets():
    """Few enough to record each, close enough to waste little; a longer length never has a smaller one."""
    buckets = [length_bucket(length) for length in range(1, 8193)]
    assert all(bucket >= length for length, bucket in enumerate(buckets, 1))
    assert buckets == sorted(buckets) and len({*buckets}) <= 48
    assert all(bucket - length < max(64, length / 8) for length, bucket in enumerate(buckets, 1))
    assert all(length_bucket(bucket) == bucket and bucket % 64 == 0 for bucket in {*buckets})
