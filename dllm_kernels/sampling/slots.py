"""Rows in flight: their tensors on the device, their pages, and what is kept of them between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from math import prod
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dllm_kernels.kv_cache import BlockKVCache
from dllm_kernels.ops.advance import BlockRows
from dllm_kernels.rule import Rule
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.graphs import Launches, upload_
from dllm_kernels.sampling.plan import Plan

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
        """Let the row take no part in anything."""
        for values in self.host.values():
            values[slot] = 0
        self.host["candidates"][slot] = -1

    def upload(self) -> None:
        """Send what was written, to be there before the next launch; the host does not wait."""
        upload_(self._there, self._here)


# ---- slots ------------------------------------------------------------------------------------------------
# Rows in flight on the device: tensors that keep their place, and what was recorded over them.

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
    column is a place for what is no candidate. sequence: int32 [slots], which row of the plan is in it.
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
        """Return a row's first `length` ids and the steps that wrote them, on the CPU, once they stand."""
        return self.canvas[slot, :length].cpu(), self.unmask_step[slot, :length].cpu()


# ---- pages of live rows -----------------------------------------------------------------------------------
# The pages of live rows: reserved on admission, shared where prompts begin alike, freed at a row's end.


class RowPages:
    """Cached sequences of rows: one for each stream of a row (with guidance, two).

    ids: int64 [B, T], whose first shareable[b] tokens are compared; whole: prefixes are shared in multiples
    of so many tokens.
    """

    def __init__(self, cache: BlockKVCache, streams: int, ids: Tensor, shareable: Tensor, whole: int):
        self.cache, self.streams, self.ids, self.whole = cache, streams, ids, whole
        self.shareable = shareable.tolist()
        self.sequences: dict[int, list[int]] = {}

    def admit(self, row: int, tokens: int, cached: Tensor) -> int | None:
        """Pages for `tokens` of a row; returns how many leading ones are in them already.

        cached: int64 [rows], leading positions in pages of each live row. None: a live row is about to
        compute a prefix of this one; nothing was reserved, ask again after the next round.
        """
        leader, shared = self.leader(row)
        if not shared:
            self.sequences[row] = []
            for _ in range(self.streams):
                self.sequences[row].append(self.cache.admit(tokens))
            return 0
        if cached[leader] < shared:
            return None
        parents, self.sequences[row] = self.sequences[leader], []
        for parent in parents:
            self.sequences[row].append(self.cache.fork(parent, shared, tokens))
        return shared

    def table(self, live: list[int]) -> Tensor:
        """Return int32 [streams · B, P], the page tables of the live rows, stream by stream."""
        return self.cache.page_table(
            [self.sequences[row][stream] for stream in range(self.streams) for row in live]
        )

    def leader(self, row: int) -> tuple[int | None, int]:
        """Return the live row that has most shareable tokens in common with `row`, and how many."""
        pairs = ((other, self._common(row, other)) for other in self.sequences)
        return max(pairs, key=lambda pair: pair[1], default=(None, 0))

    def keep(self, row: int, ids: Tensor) -> None:
        """Leave the pages of a row that is done to later calls, where those can use them. ids: int64 [n], the
        leading tokens whose keys and values are final."""

    def release(self, row: int) -> None:
        """Free what a row holds."""
        for sequence in self.sequences.pop(row, ()):
            self.cache.free(sequence)

    def release_all(self) -> None:
        for row in list(self.sequences):
            self.release(row)

    def _common(self, row: int, other: int) -> int:
        """Shareable tokens that two rows have in common at the start."""
        length = min(self.shareable[row], self.shareable[other])
        if not length:
            return 0
        same = (self.ids[row, :length] == self.ids[other, :length]).int().cumprod(0).sum()
        return int(same) // self.whole * self.whole


# ---- slots kept between calls -----------------------------------------------------------------------------
# Slots kept from one call to the next, with what was recorded over them.
#
# A graph holds addresses and constants: it serves another call whose model has its weights at the same
# places and whose options come to the same launches. One DeviceSlots is kept for each model, the latest, as
# long as the model lives; who wants its memory back calls `forget`.

KEPT_ON = ("cuda",)  # devices; elsewhere nothing is recorded, so that there is nothing to keep


class _Kept(NamedTuple):
    key: tuple
    slots: DeviceSlots


_KEPT: WeakKeyDictionary[torch.nn.Module, _Kept] = WeakKeyDictionary()


@contextmanager
def slots_of(plan: Plan, key: tuple, pages: int, make: Callable[[], DeviceSlots]) -> Iterator[DeviceSlots]:
    """Slots for one call: those kept for its model if they are of the same `key` and have so many pages, else
    new ones. A call that fails leaves none, and one that runs beside another has its own."""
    kept, model = _KEPT.pop(plan.model, None), plan.model
    if kept is not None and (kept.key != key or kept.slots.cache.pages < pages):
        kept = None  # its memory is free before the new slots need theirs
    slots = make() if kept is None else kept.slots
    try:
        yield slots
    finally:
        if slots.device.type == "cuda":  # nothing is under way when another stream takes or frees them
            torch.cuda.current_stream(slots.device).synchronize()
    if slots.device.type in KEPT_ON:
        _KEPT[model] = _Kept(key, slots)


def forget(model: torch.nn.Module) -> None:
    """Free what is kept for `model`: its pages and its graphs."""
    _KEPT.pop(model, None)


def recorded_with(plan: Plan, rule: Rule, *shapes) -> tuple:
    """All that launches depend on beside their tensors; equal tuples come to the same launches."""
    config, kind = plan.config, plan.device.type
    draws = config.temperature > 0 or rule.confidence == "random" or rule.alg_temp > 0
    options = [option.name for option in fields(SampleConfig) if not option.metadata["host_only"]]
    return (
        *(getattr(config, name) for name in options),
        *(rule, config.seed if draws else None, plan.scheme, plan.mask_id, plan.shift, *shapes),
        *(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        *(torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        *map(state_of, plan.model.modules()),
    )


_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def state_of(module: torch.nn.Module) -> tuple:
    """Return where a module's weights lie, with its parts, hooks and settings. Other attributes are compared
    by identity only."""
    weights = []
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            weights += tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()
        elif tensor is not None:
            weights.append(object())  # of others' making, with its memory elsewhere: equal to nothing
    return type(module), *weights, *((name, _seen(value)) for name, value in vars(module).items())


def _seen(value) -> object:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return tuple((name, _seen(entry)) for name, entry in value.items())
    if isinstance(value, list | tuple | set):
        return tuple(map(_seen, value))
    if isinstance(value, partial):  # that and methods are bound anew for every call
        return id(value.func), *map(id, value.args)
    return id(getattr(value, "__func__", value))
