"""Rows in flight on the device: tensors that keep their place, and what was recorded over them."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.block_cache import BlockKVCache
from dllm_kernels.ops.advance import BlockRows
from dllm_kernels.sampling.cuda_graph import Launches, upload_
from dllm_kernels.sampling.steered_rows import SteeredRows

SHORTEST = 64  # tokens: the least that lengths are rounded up by


def length_bucket(length: int) -> int:
    """`length` rounded up to a multiple of 64, beyond 1024 of a sixteenth of the next power of two: what is
    recorded for one serves many, and computes at most an eighth more than the longest before it."""
    step = max(SHORTEST, (1 << max(length - 1, 1).bit_length()) // 16)
    return -(-length // step) * step


class DeviceSlots:
    """`slots` rows of up to `width` tokens. Nothing in here refers to a model.

    canvas: int64 [slots, width]. hidden: bool [slots, width], prompt tokens that guidance hides from its
    second stream. unmask_step: int64 [slots, width + 1], the step that wrote each token, -1: given; the last
    column is a place for what is no candidate. sequence: int32 [slots], which row of the job is in it.
    table: int32 [streams · slots, P], the pages, stream by stream, in `cache`. rows: where they are. quotas:
    int32 [slots, width], of each of a row's steps, where they are known beforehand.
    stop_ids: int64 [n], tokens that end a row. chosen: int64 [1], the slot of a launch for one row. flags:
    int64 [slots, 2], what a launch tells the host of each row.

    Made when a forward has shown what an output row is: outputs: [slots · C, H], those that predict the
    candidates; before: [slots, H], that at start - 1 of each row's active block, which later steps of the
    block do not compute.
    """

    def __init__(
        self,
        rows: BlockRows | SteeredRows,
        width: int,
        cache: BlockKVCache,
        streams: int,
        stop_ids: tuple[int, ...],
        device: torch.device,
    ):
        slots = len(rows.step)
        self.rows, self.width, self.cache, self.device = rows, width, cache, device
        self.canvas = torch.zeros(slots, width, dtype=torch.int64, device=device)
        self.hidden = torch.zeros(slots, width, dtype=torch.bool, device=device)
        self.unmask_step = torch.full((slots, width + 1), -1, device=device)
        self.sequence = torch.zeros(slots, dtype=torch.int32, device=device)
        pages = -(-width // cache.page_size)
        self.table = torch.zeros(streams * slots, pages, dtype=torch.int32, device=device)
        self.quotas = torch.zeros(slots, width, dtype=torch.int32, device=device)
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(1, dtype=torch.int64, device=device)
        self.flags = torch.zeros(slots, 2, dtype=torch.int64, device=device)
        self.outputs: Tensor | None = None
        self.before: Tensor | None = None
        self.launches = Launches(device)

    def __len__(self) -> int:
        return len(self.canvas)

    def place(self, slot: int, sequence: int, ids: Tensor, hidden: Tensor, table: Tensor) -> None:
        """Put a row into a slot. ids, hidden: [T] on the CPU; table: int32 [streams, P], its pages."""
        upload_(self.canvas[slot, : len(ids)], ids)
        upload_(self.hidden[slot, : len(ids)], hidden)
        self.unmask_step[slot] = -1
        self.sequence[slot] = sequence
        self.table[slot :: len(self)] = 0
        self.table[slot :: len(self), : table.shape[1]] = table

    def taken(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """A row's first `length` ids and the steps that wrote them, on the CPU. Waits for the device."""
        return self.canvas[slot, :length].cpu(), self.unmask_step[slot, :length].cpu()
