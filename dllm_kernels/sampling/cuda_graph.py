"""A step that is launched as one CUDA graph, and flags that the host reads late.

On the CPU, and wherever nothing is recorded, a step is a plain call and its flags are there at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 2  # calls before recording: libraries choose their kernels and allocate their workspaces in them
IN_FLIGHT = 2  # steps launched whose flags were not read: the GPU always has the next one to go on with


class Step:
    """`run` by itself, or replayed from a graph, and what `flags` held after every launch.

    run: launches the same kernels on the same tensors every time, without waiting for the device; calling
    it when there is nothing to do must change nothing. flags: a small tensor that it leaves up to date.
    """

    def __init__(self, run: Callable[[], None], flags: Tensor):
        self.run, self.flags = run, flags
        self.launched = 0
        self.unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        if flags.is_cuda:
            self.pinned = [torch.empty_like(flags, device="cpu", pin_memory=True) for _ in range(IN_FLIGHT)]
            with torch.cuda.device(flags.device):  # streams and events are those of the current device
                self.graph = _recorded(run)

    def launch(self) -> None:
        """Start one step."""
        if not self.flags.is_cuda:
            self.run()
            self.unread.append((self.launched, self.flags.clone(), None))
        else:
            target = self.pinned[self.launched % IN_FLIGHT]
            event = torch.cuda.Event()
            with torch.cuda.device(self.flags.device):
                self.graph.replay()
                target.copy_(self.flags, non_blocking=True)
                event.record()
            self.unread.append((self.launched, target, event))
        self.launched += 1

    def look(self) -> tuple[int, Tensor] | None:
        """Number and flags of the oldest launch that was not looked at, once IN_FLIGHT are under way."""
        kept = IN_FLIGHT - 1 if self.flags.is_cuda else 0
        if len(self.unread) <= kept:
            return None
        number, flags, event = self.unread.popleft()
        if event is not None:
            event.synchronize()
        return number, flags.clone()


def _recorded(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
