"""Rows that the host moves from step to step, in tensors that keep their place on the device."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from dllm_kernels.sampling.cuda_graph import upload_

_ALIGNED = 32  # int32 values: every field begins at a multiple of 128 bytes


class SteeredRows:
    """`slots` rows and their next step, all int32: written on the host through `host`, then uploaded at once.
    At first no row takes part in anything.

    Where a row is, [slots]: start, end: its active block; reach: end of what is computed and seen at all;
    step: its steps so far. The next step: quota [slots]; candidates [slots, C], the positions that may be
    unmasked, -1 for none; q_lengths [slots]: its tokens in a forward that uses the cache, 0 where it takes no
    part; cache_spans [slots, 1, R, 2]: cached positions that such a forward sees.
    """

    start: Tensor
    end: Tensor
    reach: Tensor
    step: Tensor
    quota: Tensor
    candidates: Tensor
    q_lengths: Tensor
    cache_spans: Tensor

    def __init__(self, slots: int, block_size: int, spans: int, device: torch.device):
        shapes = dict.fromkeys(("start", "end", "reach", "step", "quota", "q_lengths"), (slots,))
        shapes |= dict(candidates=(slots, block_size), cache_spans=(slots, 1, spans, 2))
        sizes = {name: -(-prod(shape) // _ALIGNED) * _ALIGNED for name, shape in shapes.items()}
        self._there = torch.zeros(sum(sizes.values()), dtype=torch.int32, device=device)
        self._here = torch.zeros_like(self._there, device="cpu")
        self.host, place = {}, 0
        for name, shape in shapes.items():
            part = slice(place, place + prod(shape))
            setattr(self, name, self._there[part].view(shape))
            self.host[name] = self._here[part].view(shape).numpy()
            place += sizes[name]
        for slot in range(slots):
            self.clear(slot)
        self.upload()

    def place(
        self, slot: int, start: int, end: int, reach: int, candidates: list[int], *, computed: tuple[int, int]
    ) -> None:
        """Put a row at a block. computed: the positions that its forwards compute; they see [0, computed[0])
        and, where there is a second span, [computed[1], reach) in the cache."""
        host, (first, last) = self.host, computed
        host["start"][slot], host["end"][slot], host["reach"][slot] = start, end, reach
        host["candidates"][slot] = -1
        host["candidates"][slot, : len(candidates)] = candidates
        spans = [span for span in ((0, first), (last, reach)) if span[0] < span[1]]
        host["cache_spans"][slot] = 0
        for index, span in enumerate(spans):
            host["cache_spans"][slot, 0, index] = span

    def clear(self, slot: int) -> None:
        """A row that takes no part in anything."""
        for values in self.host.values():
            values[slot] = 0
        self.host["candidates"][slot] = -1

    def upload(self) -> None:
        """What was written is there before the next launch, and the host goes on."""
        upload_(self._there, self._here)
