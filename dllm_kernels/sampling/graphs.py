"""Launches that are recorded once, as CUDA graphs, and replayed; and flags that the host reads beside them.

On the CPU nothing is recorded: a launch is a plain call, and its flags are there at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

WARM_UP = 2  # calls before recording: libraries choose their kernels and allocate their workspaces in them


# One stream of each device for everything that is recorded, since libraries keep a workspace for each stream
# that they have seen; and one recording at a time, as torch demands.
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
_RECORDING = threading.Lock()


class NotRecorded(RuntimeError):
    """The function to record waits for the device, or does something else that a CUDA graph cannot hold."""


class Launches:
    """Functions by name, each recorded once and launched as often as wanted.

    A function launches the same kernels on the same tensors every time and does not wait for the device.
    Recording calls it WARM_UP times first, so that one more call then must change nothing. The graphs share
    one pool of memory, so that none may leave anything there for another: what lasts is copied to tensors
    that were there before. Of a recorded function nothing is kept but its graph.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.recorded: dict[Hashable, Callable[[], None]] = {}
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.stream = _STREAMS.get(device) or _STREAMS.setdefault(device, torch.cuda.Stream())
                self.pool = torch.cuda.graph_pool_handle()

    def record(self, name: Hashable, run: Callable[[], None]) -> None:
        """Make `run` known as `name`; where there is one of that name, nothing happens."""
        if name not in self.recorded:
            self.recorded[name] = self._graph_of(run).replay if self.device.type == "cuda" else run

    def launch(self, name: Hashable) -> None:
        """Start what was recorded, on the current stream."""
        on_its_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_its_device:
            self.recorded[name]()

    def _graph_of(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Warmed up and recorded on one stream, so that the handles of libraries are made beforehand."""
        graph = torch.cuda.CUDAGraph()
        with _RECORDING, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            try:
                with torch.cuda.stream(self.stream):
                    for _ in range(WARM_UP):
                        run()
            finally:
                current.wait_stream(self.stream)
            begun, cause = False, None
            try:
                # Other threads may allocate and wait meanwhile: only what this one does is recorded.
                with torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                ):
                    begun = True
                    try:
                        run()
                    except BaseException as error:
                        cause = error
                        raise
            except BaseException as error:
                if begun:
                    self._give_pool_back(graph)
                cause = cause or error  # ending a recording that is broken raises one more
                if isinstance(cause, RuntimeError) and not isinstance(cause, torch.OutOfMemoryError):
                    raise NotRecorded(str(cause).partition("\n")[0]) from cause
                raise cause from None
            finally:
                # A recording that fails leaves its own stream as the current one.
                torch.cuda.set_stream(current)
                cause = None  # a cycle through its traceback would keep what the function allocated
        return graph

    def _give_pool_back(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what beginning a recording did to torch's allocator. Where CUDA broke the recording off, torch
        may go on as if the device were capturing, so that memory is freed late, and its graph never releases
        the pool."""
        try:
            graph.pool()
            return  # the recording has ended: the graph gives the pool back when it goes
        except RuntimeError:
            device = torch.cuda.current_device()
        with suppress(RuntimeError):  # torch had ended it before it raised
            torch._C._cuda_endAllocateToPool(device, self.pool)
        if torch.__version__ < (2, 14):  # of later ones it is not known
            torch._C._cuda_releasePool(device, self.pool)


class Flags:
    """The contents of a small tensor after each of the launches that `note` was called behind.

    in_flight: launches that may be under way before the host waits for the oldest: with 1 it waits for each,
    with 2 the device always has the next one to go on with.
    """

    def __init__(self, tensor: Tensor, in_flight: int):
        self.tensor = tensor
        self.kept = in_flight - 1 if tensor.is_cuda else 0
        self.launched = 0
        self.unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        if tensor.is_cuda:
            self.pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True) for _ in range(in_flight)]

    def note(self) -> None:
        """Behind a launch: its flags are on their way to the host."""
        if not self.tensor.is_cuda:
            self.unread.append((self.launched, self.tensor.clone(), None))
        else:
            target = self.pinned[self.launched % len(self.pinned)]
            with torch.cuda.device(self.tensor.device):  # events are those of the current device
                event = torch.cuda.Event()
                target.copy_(self.tensor, non_blocking=True)
                event.record()
            self.unread.append((self.launched, target, event))
        self.launched += 1

    def look(self) -> tuple[int, Tensor] | None:
        """Number and flags of the oldest launch that was not looked at, once `in_flight` are under way."""
        if len(self.unread) <= self.kept:
            return None
        number, flags, event = self.unread.popleft()
        if event is not None:
            event.synchronize()
        return number, flags.clone()


def upload_(target: Tensor, values: Tensor) -> None:
    """Copy `values`, on the CPU, into `target` without waiting for its device. They may change right after:
    torch keeps the pinned copy until it has been read."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)
