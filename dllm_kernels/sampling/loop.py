"""The loops: rows are admitted, a round gives each live row one step at its own block, finished rows leave.

Rows are independent: each has its own prompt length, active block, step and end. A round is one view, one
forward over it and one commit into the canvases. Which cache is used changes the view, not the loop. `Rounds`
looks at every row after every round; `BlockRounds` and `RefreshedRounds` leave rows on the device, where CUDA
graphs replay their rounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dllm_kernels.ops.advance import BlockRows, advance_
from dllm_kernels.ops.token_stats import TokenStats
from dllm_kernels.ops.unmask import commit_
from dllm_kernels.sampling.graphs import Flags, upload_
from dllm_kernels.sampling.plan import Plan
from dllm_kernels.sampling.prompts import Canvases
from dllm_kernels.sampling.runner import ModelRunner
from dllm_kernels.sampling.slots import (
    DeviceSlots,
    RowPages,
    SteeredRows,
    length_bucket,
    recorded_with,
    slots_of,
)
from dllm_kernels.sampling.step import Acceptance, BlockSteps, Frame, Predictions, Statistics, rule_of
from dllm_kernels.sampling.views import SCHEMES, DeviceView, Rows, view_of

NO_TOKEN = "no token can be committed: suppress_tokens leaves none of the vocabulary"


@dataclass(frozen=True)
class Round:
    """What one round did, as `on_round` gets it.

    rows, positions, tokens: int64 [n], what was committed: index of the prompt, position, token id.
    canvas: int64 [B, T], a copy of all canvases as they stand. forwards: forward passes so far.
    """

    rows: Tensor
    positions: Tensor
    tokens: Tensor
    canvas: Tensor
    forwards: int

    def positions_of(self, row: int) -> list[int]:
        """Positions committed in one row in this round."""
        return self.positions[self.rows == row].tolist()


class Rounds:
    """The state of all rows of one call, and the rounds over those that are live.

    start, end: int64 [B], the active block; cached: leading positions whose keys and values are final and in
    pages; step: forwards the row took part in; blocks: how each row's active block goes on. blank: bool
    [B, T], what was masked at first: all else is prompt.
    """

    def __init__(
        self,
        plan: Plan,
        canvases: Canvases,
        on_round: Callable[[Round], None] | None = None,
        stop_ids: tuple[int, ...] = (),
    ):
        plan.check_length(canvases)
        device = plan.device
        canvases.ids = canvases.ids.to(device)
        self.plan, self.canvases, self.ids, self.on_round = plan, canvases, canvases.ids, on_round
        self.given, self.origin, self.stop, self.canvas_end, self.numbers = (
            values.to(device)
            for values in (canvases.given, canvases.origin, canvases.stop, canvases.end, canvases.numbers)
        )
        self.blank = self.ids == plan.mask_id
        self.block_size = plan.config.block_size if plan.block_causal else None
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        count = len(self.ids)
        self.start, self.end, self.cached, self.step = torch.zeros(4, count, dtype=torch.int64, device=device)
        self.unmask_step = torch.full_like(self.ids, -1)
        self.blocks_of = [self._count_blocks(row) for row in range(count)]
        self.rule = rule_of(plan.config, self.blocks_of)
        self.acceptance = Acceptance(plan, self.rule, self.blank, self.canvas_end)
        self.blocks = [BlockSteps() for _ in range(count)]
        self.scaling = [plan.runner.scaling_of(end) for end in self.canvas_end.tolist()]
        self.slots = min(plan.config.max_batch or count, count)
        self.slot_of: dict[int, int] = {}
        width = min(plan.config.block_size, self.ids.shape[1])
        self.predictions = Predictions(plan, self.rule, count, self.slots, width)
        self.pages: RowPages | None = None
        self.frame: Frame | None = None
        self.forwards = 0
        self.history = [self.ids.clone()] if plan.config.history else None

    def run(self) -> None:
        """Every row to its end. Pages come back and the model is left as it was found, whatever happens."""
        waiting, live = deque(range(len(self.ids))), []
        with self.plan.runner.ready():
            if self.plan.scheme.keeps is not None:
                plan, canvases = self.plan, self.canvases
                cache = plan.cache_of(plan.pages_for(canvases.end))
                self.pages = RowPages(
                    cache, plan.streams, self.ids.clone(), plan.shareable(canvases), plan.config.block_size
                )
            try:
                while waiting or live:
                    # 1. Rows that wait take free slots, and pages where there is a cache.
                    live += self.admit(waiting, self.slots - len(live))
                    if live:
                        live = self.round(live)
            finally:
                if self.pages is not None:
                    self.pages.release_all()

    def admit(self, waiting: deque[int], room: int) -> list[int]:
        """Rows that go live, up to `room` of them, all of one scaling; the rest goes on waiting, in order."""
        admitted, held_back = [], []
        while waiting and len(admitted) < room:
            row = waiting.popleft()
            if any(self.scaling[row] != self.scaling[other] for other in self.slot_of):
                held_back.append(row)
                continue
            if self.pages is not None:
                cached = self.pages.admit(row, int(self.canvas_end[row]), self.cached)
                if cached is None:
                    held_back.append(row)
                    continue
                self.cached[row] = cached
            self.slot_of[row] = min({*range(self.slots)} - {*self.slot_of.values()})
            if self.advance(row):
                admitted.append(row)
            else:
                self.release(row)
        waiting.extendleft(reversed(held_back))
        return admitted

    def round(self, live: list[int]) -> list[int]:
        """One step for every live row; returns those that go on."""
        plan = self.plan
        # 2. Where the rows stand: the positions of their active blocks, and what the next forward sees.
        frame = self.frame = self.frame_of(live)
        if self.scaling[live[0]]:
            plan.runner.length = int(self.canvas_end[live[0]])
        rows, window, step = frame.rows, frame.window, self.step[frame.rows]
        blocks = [self.blocks[row] for row in live]

        # 3. Candidates: the positions that this step may fill, or edit.
        canvas = self.ids[rows]
        masked = frame.inside & (canvas.gather(1, frame.index) == plan.mask_id)
        listed = self.acceptance.candidates(frame, blocks, canvas, masked)
        slot = listed.flatten().nonzero()[:, 0]
        row, position = slot // window.shape[1], window.flatten()[slot]
        noise_ids = None
        if plan.config.temperature > 0:
            noise_ids = torch.stack([frame.numbers[row], position, step[row]], dim=-1).int()

        # 4. One forward, and the token and confidence of each candidate.
        stats, forwards = self.predictions.of(
            self.streams_of(canvas, rows), frame.view, rows, self.start[rows], (row, position), noise_ids,
            torch.tensor([self.slot_of[row] for row in live], device=rows.device),
        )  # fmt: skip

        # 5. The rule writes what it accepts into the canvas.
        stats = _spread(stats, slot, listed.numel())
        accepted = self.acceptance.commit_(frame, blocks, canvas, listed, stats, step)
        if bool((masked.any(1) & ~accepted.any(1)).any()):
            raise ValueError(NO_TOKEN)
        row, position = accepted.nonzero(as_tuple=True)
        row, position = rows[row], window[row, position]
        self.ids[rows] = canvas
        self.unmask_step[row, position] = self.step[row]
        self.step[rows] += 1
        self.forwards += forwards
        for block in blocks:
            block.taken, block.index = block.taken + 1, block.index + 1

        # 6. What the forward left in the cache is final up to the active block.
        if frame.view.writes:
            self.cached[rows] = self.start[rows]
            self.frame = None

        # 7. Rows whose block is full go on to the next one; rows that are done give slot and pages back.
        going = self.settle(frame, canvas.gather(1, frame.index), masked, accepted)

        # 8. Whoever watches is told.
        if self.history is not None:
            self.history.append(self.ids.clone())
        if self.on_round is not None:
            self.on_round(self.event(row, position))
        return going

    def settle(self, frame: Frame, tokens: Tensor, masked: Tensor, accepted: Tensor) -> list[int]:
        """Rows whose block is complete move on, rows that are done leave; returns those that go on.

        tokens: int64 [B, C], the active blocks as they now are; masked: before; accepted: what changed.
        """
        never = torch.iinfo(torch.int64).max
        window, rows = frame.window, frame.rows
        is_mask = frame.inside & (tokens == self.plan.mask_id)
        is_end = frame.inside & (window >= self.given[rows, None]) & torch.isin(tokens, self.stop_ids)
        first_mask = torch.where(is_mask, window, never).amin(1).tolist()
        first_end = torch.where(is_end, window, never).amin(1).tolist()
        stops = self.stop[rows].tolist()
        editing = self.editing(frame, masked, is_mask, accepted)
        going = []
        for row, mask_at, end_at, stop in zip(frame.live, first_mask, first_end, stops, strict=True):
            if row in editing:
                going.append(row)
                continue
            if end_at < mask_at:
                self.ids[row, end_at + 1 :] = self.plan.fill
                self.unmask_step[row, end_at + 1 :] = -1
            elif mask_at < stop or self.advance(row):
                going.append(row)
                continue
            self.release(row)
        return going

    def editing(self, frame: Frame, before: Tensor, after: Tensor, accepted: Tensor) -> set[int]:
        """Live rows that go on in their block because what stands may still be edited.

        before, after: bool [B, C], the masks at the beginning and the end of the round.
        """
        if self.rule.name != "edit":
            return set()
        flags = (tensor.any(1).tolist() for tensor in (before, after, accepted))
        most = self.plan.config.max_post_steps
        return {
            row
            for row, had_masks, has_masks, changed in zip(frame.live, *flags, strict=True)
            if has_masks or not self.blocks[row].is_edited(had_masks, changed, most)
        }

    def event(self, row: Tensor, position: Tensor) -> Round:
        """What `on_round` is told, without what lies beyond a row's completion."""
        kept = position < self.stop[row]
        row, position = row[kept], position[kept]
        place = torch.arange(int(self.stop.max()), device=self.ids.device)
        canvas = self.ids[:, : len(place)].masked_fill(place >= self.stop[:, None], self.plan.fill)
        return Round(row, position, canvas[row, position], canvas, self.forwards)

    def frame_of(self, live: list[int]) -> Frame:
        """The next forward over the live rows: where their blocks are, what it computes and sees."""
        stale = [self.blocks[row].stale(self.plan.config.refresh_every) for row in live]
        if self.frame is not None and self.frame.live == live and self.frame.stale == stale:
            return self.frame
        rows = torch.tensor(live, device=self.ids.device)
        start, end, reach = self.start[rows], self.end[rows], self.canvas_end[rows]
        if self.block_size is not None:
            reach = end
        elif self.plan.config.suffix_window is not None:
            reach = torch.minimum(reach, end + self.plan.config.suffix_window)
        window = start[:, None] + torch.arange(int((end - start).max()), device=rows.device)
        state = Rows(
            start, end, reach, self.cached[rows], torch.tensor(stale, device=rows.device), self.origin[rows]
        )
        if self.plan.streams == 2:
            state = state.twice()
        cached = () if self.pages is None else (self.pages.cache, self.pages.table(live))
        view = view_of(self.plan.scheme, state, self.block_size, *cached)
        index = window.clamp(max=self.ids.shape[1] - 1)
        return Frame(live, stale, rows, self.numbers[rows], start, window, window < end[:, None], index, view)

    def streams_of(self, canvas: Tensor, rows: Tensor) -> Tensor:
        """The canvases [B, T] of the live rows; with guidance those without their prompts behind them."""
        if self.plan.streams == 1:
            return canvas
        kept = torch.tensor(self.plan.config.cfg_keep_tokens, dtype=torch.int64, device=canvas.device)
        hidden = ~self.blank[rows] & ~torch.isin(canvas, kept)
        return torch.cat([canvas, canvas.masked_fill(hidden, self.plan.mask_id)])

    def advance(self, row: int) -> bool:
        """Move a row to its next block that holds a mask; False when nothing is left to fill."""
        self.frame = None
        masks = self._masks(row, int(self.end[row]))
        if not len(masks) or masks[0] >= self.stop[row]:
            return False
        size, origin = self.plan.config.block_size, self.origin[row]
        start = origin + (masks[0] - origin) // size * size
        self.start[row], self.end[row] = start, torch.minimum(start + size, self.canvas_end[row])
        self.blocks[row] = BlockSteps()
        count = int((masks < self.end[row]).sum())
        if self.acceptance.needs_quota:
            draw = int(self.numbers[row]), int(start)
            quotas = self.plan.config.quotas(count, self.blocks_of[row], draw)
            self.blocks[row].quotas = deque(quotas)
        self.predictions.begin_block(self.slot_of[row])
        return True

    def release(self, row: int) -> None:
        """A row leaves: its slot and its pages are free."""
        del self.slot_of[row]
        if self.pages is not None:
            self.pages.release(row)

    def measured(self) -> dict:
        """What the output reports of the run."""
        return dict(
            forwards=self.forwards, row_forwards=self.step.cpu(), exact=not self.plan.config.approximate,
            history=self.history,
        )  # fmt: skip

    def _masks(self, row: int, first: int = 0) -> Tensor:
        """int64, the masked positions of a row's canvas from `first` on."""
        return (self.ids[row, first : int(self.canvas_end[row])] == self.plan.mask_id).nonzero()[:, 0] + first

    def _count_blocks(self, row: int) -> int:
        """Blocks of a row that hold masks, over which its steps are spread."""
        if self.plan.parity.every_block_counts:
            return -(-int((self.stop - self.origin).max()) // self.plan.config.block_size)
        return len(((self._masks(row) - self.origin[row]) // self.plan.config.block_size).unique())


def _spread(stats: TokenStats, slot: Tensor, count: int) -> TokenStats:
    """The rows of `stats` at their slots among `count`."""
    if len(slot) == count:
        return stats
    return TokenStats(
        *(None if field is None else field.new_zeros(count).index_copy_(0, slot, field) for field in stats)
    )


# ---- rounds on the device ---------------------------------------------------------------------------------
# Rounds that stay on the device: what those of block-causal and of bidirectional models have in common.
#
# A step gathers the ids of its positions, runs the model, takes the statistics of the candidates and commits
# what the rule accepts. Here it is a sequence of launches on tensors that keep their place (`DeviceSlots`),
# recorded once as CUDA graphs (graphs.py) that serve later calls too (`slots_of`). `BlockRounds` and
# `RefreshedRounds` say which positions a step computes and how rows go on. Tokens, the steps that wrote them
# and the forwards that a row takes part in are those of `Rounds`; how many the model makes in all may
# differ.


class DeviceRounds(ABC):
    """All rows of one call, some of them in slots.

    width, columns: the most positions of a row and of a block. holds: for each slot the row in it.
    """

    def __init__(self, plan: Plan, canvases: Canvases, stop_ids: tuple[int, ...] = ()):
        plan.check_length(canvases)
        self.plan, self.canvases, self.stop_ids = plan, canvases, stop_ids
        self.size, self.device = plan.config.block_size, plan.device
        self.width = length_bucket(int(canvases.end.max()))
        self.columns = min(self.size, self.width)
        self.ids, self.unmask_step = canvases.ids.clone(), torch.full_like(canvases.ids, -1)
        self.row_forwards = torch.zeros(len(self.ids), dtype=torch.int64, device="cpu")
        self.forwards = 0
        self.masks_of = [self._masks_by_block(row) for row in range(len(self.ids))]
        self.rule = rule_of(plan.config, [len(blocks) for blocks in self.masks_of])
        self.holds: list[int | None] = [None] * min(plan.config.max_batch or len(self.ids), len(self.ids))
        self.statistics = Statistics(plan, self.rule, len(self.holds), self.columns)
        kept = torch.tensor(plan.config.cfg_keep_tokens, dtype=torch.int64, device="cpu")
        self.hidden = (self.ids != plan.mask_id) & ~torch.isin(self.ids, kept)

    @staticmethod
    def serves(plan: Plan) -> bool:
        """Whether nothing that `plan` asks for must be seen or done by the host in every round."""
        return (
            isinstance(plan.runner, ModelRunner)
            and not (plan.config.history or plan.config.parity)
            and plan.config.acceptance(1).name not in ("bernoulli", "confident_stable", "edit")
        )

    @abstractmethod
    def rows_for(self, slots: int) -> BlockRows | SteeredRows:
        """Rows that have nothing to do."""

    @abstractmethod
    def record(self) -> None:
        """Record what every round launches; no slot holds a row."""

    @abstractmethod
    def round(self, waiting: deque[int]) -> None:
        """Waiting rows into free slots, one step of all rows, and those at their end out of their slots."""

    def run(self) -> None:
        """Every row with masks to its end. `canvases` changes only then."""
        waiting = deque(row for row, blocks in enumerate(self.masks_of) if blocks)
        with self.prepared():
            while waiting or any(row is not None for row in self.holds):
                self.round(waiting)
        self.canvases.ids = self.ids

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Slots, pages and launches are there. Afterwards pages have come back and the model is as it was
        found, whatever happened."""
        plan, ends = self.plan, self.canvases.end
        buckets = [length_bucket(end) for end in ends.tolist()]
        pages = plan.pages_for(torch.tensor(buckets, device="cpu"))

        def make() -> DeviceSlots:
            rows, cache = self.rows_for(len(self.holds)), plan.cache_of(pages)
            return DeviceSlots(rows, self.width, cache, plan.streams, self.stop_ids, self.device)

        with ExitStack() as stack:
            stack.enter_context(plan.runner.ready())
            key = recorded_with(plan, self.rule, self.stop_ids, len(self.holds), self.width)
            self.slots = stack.enter_context(slots_of(plan, key, pages, make))
            shareable = plan.shareable(self.canvases)
            self.pages = RowPages(self.slots.cache, plan.streams, self.ids.clone(), shareable, self.size)
            self.record()
            try:
                yield
            finally:
                self.pages.release_all()

    def place(self, row: int, slot: int, cached: Tensor) -> int:
        """Hand a slot to a row; returns how many leading positions are in its pages. cached: as of
        `RowPages.admit`."""
        shared = self.pages.admit(row, int(self.canvases.end[row]), cached)
        self.holds[slot] = row
        self.slots.place(
            slot, int(self.canvases.numbers[row]), self.ids[row], self.hidden[row], self.pages.table([row])
        )
        return shared

    def take(self, slot: int, forwards: int) -> None:
        """Take over a row that has finished, after so many forwards of its own, and free its slot."""
        row = self.holds[slot]
        self.ids[row], self.unmask_step[row] = self.slots.taken(slot, self.ids.shape[1])
        self.row_forwards[row] = forwards
        self._fill_after_end(row)
        self.pages.release(row)
        self.holds[slot] = None

    def measured(self) -> dict:
        """What the output reports of the run."""
        return dict(
            forwards=self.forwards, row_forwards=self.row_forwards, exact=not self.plan.config.approximate,
            history=None,
        )  # fmt: skip

    # ---- what is recorded ------------------------------------------------------------------------------
    def outputs(
        self, view: DeviceView, slots: Tensor | slice, first: Tensor, start: Tensor, candidates: Tensor
    ) -> Tensor:
        """Output rows [B·C, H] that predict the candidates, of one forward over `view`.

        slots: which of them its B rows are. first, start: int32 [B], the first position that is computed, and
        of the active block. candidates: int32 [B, C].
        """
        plan, position = self.plan, view.position_ids.long()
        count, queries = position.shape
        tokens = self.slots.canvas[slots].gather(1, position)
        source = candidates
        if plan.shift:
            source = torch.cat([(candidates - 1).clamp(min=0), start[:, None] - 1], dim=1)
        place = (source - first[:, None]).clamp(0, queries - 1)
        place = (place + queries * torch.arange(count, device=place.device)[:, None]).flatten()
        if plan.streams == 2:
            hidden = self.slots.hidden[slots].gather(1, position)
            tokens = torch.cat([tokens, tokens.masked_fill(hidden, plan.mask_id)])
            place, view = torch.cat([place, place + count * queries]), view.twice()
        output, _ = plan.runner.outputs(tokens, view, place)
        if plan.streams == 2:
            conditional, unconditional = output.chunk(2)
            output = torch.lerp(unconditional, conditional, 1 + plan.config.cfg_scale)
        if not plan.shift:
            return output
        output = output.view(count, -1, output.shape[-1])
        output, edge = output[:, :-1], output[:, -1]
        if self.slots.before is None:
            self.slots.before = output.new_zeros(len(self.slots), output.shape[-1])
        # Of forwards over what stands before a block, the last one reaches it.
        before = torch.where((first < start)[:, None], edge, self.slots.before[slots])
        self.slots.before[slots] = before
        earlier = source[:, :-1] < first[:, None]
        return torch.where(earlier[..., None], before[:, None], output).flatten(0, 1)

    def commit(self, outputs: Tensor) -> None:
        """Commit what the rule accepts of the candidates, whose output rows [slots · C, H] these are."""
        slots, rows, plan = self.slots, self.slots.rows, self.plan
        noise_ids = None
        if plan.config.temperature > 0:
            fields = slots.sequence[:, None], rows.candidates, rows.step[:, None]
            noise_ids = torch.stack(torch.broadcast_tensors(*fields), dim=-1).flatten(0, 1)
        accepted = commit_(
            slots.canvas, rows.candidates, self.statistics.of(outputs, noise_ids), self.rule,
            mask_id=plan.mask_id, quota=rows.quota if self.rule.needs_quota else None, step=rows.step,
            sequence_ids=slots.sequence, seed=plan.config.seed,
        )  # fmt: skip
        at = rows.candidates.masked_fill(~accepted, slots.width).long()
        slots.unmask_step.scatter_(1, at, rows.step[:, None].expand_as(at).long())

    # ---- rows on the host ------------------------------------------------------------------------------
    def _masks_by_block(self, row: int) -> list[list[int]]:
        """The masked positions of each block of a row that has any."""
        blocks: dict[int, list[int]] = {}
        ids = self.ids[row, : int(self.canvases.end[row])]
        for position in (ids == self.plan.mask_id).nonzero()[:, 0].tolist():
            blocks.setdefault((position - int(self.canvases.origin[row])) // self.size, []).append(position)
        return list(blocks.values())

    def _fill_after_end(self, row: int) -> None:
        """What stands after an end token with no mask before it was not worth computing."""
        ids, given, stop = self.ids[row], self.canvases.given[row], self.canvases.stop[row]
        position = torch.arange(len(ids), device="cpu")
        stops = torch.tensor(self.stop_ids, dtype=ids.dtype, device="cpu")
        ends = torch.isin(ids, stops) & (position >= given)
        if not ends.any():
            return
        first = int(ends.int().argmax())
        if first < stop and not (ids[given:first] == self.plan.mask_id).any():
            ids[first + 1 :] = self.canvases.fill
            self.unmask_step[row, first + 1 :] = -1


# ---- block-causal rounds ----------------------------------------------------------------------------------
# Block-causal rounds on the device: the host only hands out rows, and collects them late.
#
# `Rounds` asks after every step how far each row is. Here `advance_` moves the rows, so that every step is
# one and the same graph. A block's first step also computes the block finished before it and leaves its keys
# and values in the pages; rows that have finished, or have no work yet, pass through a step unchanged.
#
# With many rows a graph over two blocks of each would compute twice the tokens in all steps but the first of
# a block. Then there is a second graph, over the active blocks alone, which writes nothing to the pages. The
# host waits for every step to know whether a row needs the larger one: short against a step of so many
# tokens.

BLOCKS_AT_ONCE = 2  # in a row's forward: the active block, and the one before it
IN_FLIGHT = 2  # steps of the same graph: the GPU always has the next one to go on with
FEW_TOKENS = 128  # of all rows: computing so many takes no longer than reading the weights
MOST_STOP_IDS = 16  # that `advance_` takes
STEP = "step"


class BlockRounds(DeviceRounds):
    """Rounds with cache="block".

    since: for each slot the number of launches before its row came. widths: the queries of a row in each
    graph; queries: those of the next step.
    """

    def __init__(self, plan: Plan, canvases: Canvases, stop_ids: tuple[int, ...] = ()):
        super().__init__(plan, canvases, stop_ids)
        self.shareable = plan.shareable(canvases)
        self.since = [0] * len(self.holds)
        widest = BLOCKS_AT_ONCE * self.size
        few = plan.streams * len(self.holds) * widest <= FEW_TOKENS
        self.widths = (widest,) if few else (self.size, widest)
        self.queries = self.widths[0]  # nothing to compute before a step has found the rows' first blocks

    @staticmethod
    def serves(plan: Plan) -> bool:
        """As DeviceRounds.serves. Where a step may commit more than its quota, the next one is that of a step
        of the block, which `advance_` knows for one schedule."""
        more_than_quota = plan.config.acceptance(1).name == "quota_or_threshold"
        return (
            DeviceRounds.serves(plan)
            and plan.scheme is SCHEMES["block"]
            and (plan.config.schedule == "llada" or not more_than_quota)
            and len(plan.eos_ids) <= MOST_STOP_IDS
        )

    def rows_for(self, slots: int) -> BlockRows:
        return BlockRows.empty(slots, self.size, BLOCKS_AT_ONCE * self.size, self.device)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        with super().prepared():
            rows, in_flight = self.slots.rows, IN_FLIGHT if len(self.widths) == 1 else 1
            self.flags, self.lengths = (Flags(of, in_flight) for of in (rows.block_start, rows.q_lengths))
            yield

    def record(self) -> None:
        if self.plan.shift and self.slots.before is None:
            self.step(self.queries)
        for queries in self.widths:
            self.slots.launches.record((STEP, queries), partial(self.step, queries))

    def step(self, queries: int) -> None:
        """One forward of every slot, one commit, and every row to its next step. No row has more queries."""
        slots, rows = self.slots, self.slots.rows
        beyond_the_block = queries > self.size  # else no row has final tokens to write
        view = DeviceView(
            rows.query_positions[:, :queries].contiguous(), rows.q_lengths, rows.cache_spans,
            rows.fresh_spans[:, :queries].contiguous(), rows.write_positions if beyond_the_block else None,
            slots.table, slots.cache,
        )  # fmt: skip
        self.commit(self.outputs(view, slice(None), rows.cached, rows.block_start, rows.candidates))
        whole_block = self.size if self.rule.name == "quota_or_threshold" else None
        advance_(
            slots.canvas, rows, mask_id=self.plan.mask_id, quota_total=whole_block, stop_ids=self.stop_ids
        )
        if self.rule.name == "quota":
            step = rows.step.clamp(max=slots.width - 1).long()
            rows.quota.copy_(slots.quotas.gather(1, step[:, None])[:, 0])

    def round(self, waiting: deque[int]) -> None:
        self.admit(waiting)
        self.launch()
        self.collect()
        if self.flags.launched > max(self.since) + self.most_steps():
            raise ValueError(NO_TOKEN)

    def launch(self) -> None:
        """Start one step."""
        self.slots.launches.launch((STEP, self.queries))
        self.flags.note()
        if len(self.widths) > 1:
            self.lengths.note()

    def admit(self, waiting: deque[int]) -> None:
        """Waiting rows into free slots; the launch after the next is the first that works on them."""
        for slot, row in enumerate(self.holds):
            if row is not None or not waiting:
                continue
            row = waiting.popleft()
            cached, whole = self.place(row, slot, self.shareable), int(self.shareable[row])
            self.since[slot] = self.flags.launched
            if self.rule.name == "quota":
                quotas = torch.tensor(self.quotas_of(row), dtype=torch.int32, device="cpu")
                upload_(self.slots.quotas[slot, : len(quotas)], quotas)
            if whole > cached:
                self._compute_prompt(slot, cached, whole)
            given, stop, end = (
                int(bound[row]) for bound in (self.canvases.given, self.canvases.stop, self.canvases.end)
            )
            steps = self.plan.config.steps_of_block(max(len(self.masks_of[row]), 1)) or 0
            self.slots.rows.admit_(slot, given=given, stop=stop, canvas_end=end, steps=steps, cached=whole)

    def collect(self) -> None:
        """Take over the rows that had finished when the launch looked at was done, and choose the graph of
        the next step: the smallest that computes all that a row asks for."""
        looked = self.flags.look()
        if looked is None:
            return
        number, block_start = looked
        if len(self.widths) > 1:
            longest = int(self.lengths.look()[1].max())
            self.queries = next(queries for queries in self.widths if queries >= longest)
        self.forwards += 1
        for slot, (row, start) in enumerate(zip(self.holds, block_start.tolist(), strict=True)):
            # A launch from before the row came, or the one that finds its first block, says nothing of it.
            if row is not None and number >= self.since[slot] and start >= self.canvases.end[row]:
                self.take(slot, int(self.slots.rows.step[slot]))

    def quotas_of(self, row: int) -> list[int]:
        """Of all steps of a row, each of which commits its quota: block after block."""
        config, blocks = self.plan.config, self.masks_of[row]
        number = int(self.canvases.numbers[row])
        starts = [masks[0] // self.size * self.size for masks in blocks]
        return [
            quota
            for start, masks in zip(starts, blocks, strict=True)
            for quota in config.quotas(len(masks), len(blocks), (number, start))
        ]

    def most_steps(self) -> int:
        """More than any row takes: one for each mask, each block to catch up with, and those in flight."""
        return 2 * self.slots.width + 8

    def _compute_prompt(self, slot: int, first: int, last: int) -> None:
        """Keys and values of the prompt's positions [first, last) into the row's pages."""
        bound = torch.tensor([[first], [last]], device=self.device)
        none, slots = torch.zeros_like(bound[0]), self.slots
        state = Rows(bound[1], bound[1], bound[1], bound[0], none.bool(), none)
        ids = slots.canvas[slot : slot + 1]
        if self.plan.streams == 2:
            hidden = ids.masked_fill(slots.hidden[slot], self.plan.mask_id)
            state, ids = state.twice(), torch.cat([ids, hidden])
        view = view_of(SCHEMES["block"], state, self.size, slots.cache, slots.table[slot :: len(slots)])
        ids = ids[view.packing.row, view.packing.position]
        self.plan.runner.outputs(ids[None], view, none[:0])
        self.forwards += 1


# ---- bidirectional rounds with a cache --------------------------------------------------------------------
# Bidirectional rounds on the device, with cache="prefix" or "dual".
#
# Whether a row's next step is a refresh, and where its next block is, follows from what its last step left:
# the host waits for two small flags of every row after each round, then writes the rows' next step and
# uploads it (`SteeredRows`). A round launches up to three kinds of graphs: a forward of the rows that use
# their cache; a refresh of each row that renews it, by itself, in a bucket of its length; and one commit of
# them all. A row that takes no part in a forward has no queries there. So a round makes more forwards than
# one of `Rounds`, where some rows renew their cache in the same forward in which others use it.

COMMIT, FORWARD, REFRESH = "commit", "forward", "refresh"


@dataclass
class SlotRow:
    """A row in a slot. blocks: the masks of those that are to come; taken: its steps so far. Of its active
    block, steps: how it goes on; left: masks; queries: tokens of a forward that uses the cache."""

    row: int
    blocks: deque[list[int]]
    taken: int = 0
    steps: BlockSteps = field(default_factory=BlockSteps)
    left: int = 0
    queries: int = 0


class RefreshedRounds(DeviceRounds):
    """live: the rows in slots, by slot. around: whether what stands behind the block is cached as well."""

    def __init__(self, plan: Plan, canvases: Canvases, stop_ids: tuple[int, ...] = ()):
        super().__init__(plan, canvases, stop_ids)
        self.live: dict[int, SlotRow] = {}
        self.around = plan.scheme.keeps == "around"
        self.nothing_cached = torch.zeros(len(self.ids), dtype=torch.int64, device="cpu")

    @staticmethod
    def serves(plan: Plan) -> bool:
        """As DeviceRounds.serves, of the schemes whose cache is renewed."""
        return DeviceRounds.serves(plan) and plan.scheme.keeps is not None and not plan.scheme.exact

    def rows_for(self, slots: int) -> SteeredRows:
        return SteeredRows(slots, self.columns, 1 + self.around, self.device)

    def record(self) -> None:
        """Forwards and refreshes are recorded when their length first occurs: repeating them changes nothing.
        A commit is not repeated, so that it is recorded while there is nothing to commit."""
        slots = self.slots
        self.flags = Flags(slots.flags, in_flight=1)
        if slots.outputs is None:
            self.forward(self.columns)
        slots.launches.record(COMMIT, self.commit_all)

    def round(self, waiting: deque[int]) -> None:
        self.admit(waiting)
        every = self.plan.config.refresh_every
        stale = [slot for slot, row in self.live.items() if row.steps.stale(every)]
        for slot, row in self.live.items():
            self.write(slot, row, slot in stale)
        self.slots.rows.upload()
        if len(stale) < len(self.live):
            longest = int(self.slots.rows.host["q_lengths"].max())
            queries = self.columns if longest <= self.columns else length_bucket(longest)
            self.launch((FORWARD, queries), partial(self.forward, queries))
        for slot in stale:
            length = length_bucket(int(self.slots.rows.host["reach"][slot]))
            self.slots.chosen.fill_(slot)
            self.launch((REFRESH, length), partial(self.refresh, length))
        self.slots.launches.launch(COMMIT)
        self.flags.note()
        _, flags = self.flags.look()
        self.settle(flags.tolist())

    def launch(self, name: tuple[str, int], run) -> None:
        """One forward through the model."""
        self.slots.launches.record(name, run)
        self.slots.launches.launch(name)
        self.forwards += 1

    def admit(self, waiting: deque[int]) -> None:
        """Waiting rows into free slots."""
        for slot, row in enumerate(self.holds):
            if row is None and waiting:
                row = waiting.popleft()
                self.place(row, slot, self.nothing_cached)
                self.live[slot] = SlotRow(row, deque(self.masks_of[row]))
                self.begin_block(slot)

    def begin_block(self, slot: int) -> None:
        """Move a row to the next of its blocks."""
        config, row = self.plan.config, self.live[slot]
        origin, stop = int(self.canvases.origin[row.row]), int(self.canvases.end[row.row])
        masks = row.blocks.popleft()
        start = origin + (masks[0] - origin) // self.size * self.size
        end = min(start + self.size, stop)
        reach = stop if config.suffix_window is None else min(stop, end + config.suffix_window)
        state = (torch.tensor([bound], device="cpu") for bound in (start, end, reach, 0, False, origin))
        computed = tuple(int(bound) for bound in self.plan.scheme.computed(Rows(*state)))
        self.slots.rows.place(slot, start, end, reach, masks, computed=computed)
        row.steps, row.left, row.queries = BlockSteps(), len(masks), computed[1] - computed[0]
        if self.rule.needs_quota:
            blocks = len(self.masks_of[row.row])
            draw = int(self.canvases.numbers[row.row]), start
            row.steps.quotas = deque(config.quotas(len(masks), blocks, draw))

    def write(self, slot: int, row: SlotRow, stale: bool) -> None:
        """The row's next step, for the device."""
        host = self.slots.rows.host
        host["q_lengths"][slot] = 0 if stale else row.queries
        host["step"][slot] = row.taken
        if self.rule.needs_quota:
            host["quota"][slot] = row.steps.next_quota(self.columns)

    def settle(self, flags: list[list[int]]) -> None:
        """Rows whose block is complete move on, rows that are done leave."""
        for slot, row in list(self.live.items()):
            left, ended = flags[slot]
            if left == row.left:
                raise ValueError(NO_TOKEN)
            row.left = left
            row.taken, row.steps.taken = row.taken + 1, row.steps.taken + 1
            if not ended and left:
                continue
            if row.blocks and not ended:
                self.begin_block(slot)
            else:
                self.slots.rows.clear(slot)
                self.take(slot, row.taken)
                del self.live[slot]

    # ---- what is recorded ------------------------------------------------------------------------------
    def forward(self, queries: int) -> None:
        """Output rows of all rows with q_lengths > 0, from a forward over so many positions of each."""
        slots, rows = self.slots, self.slots.rows
        column = torch.arange(queries, dtype=torch.int32, device=self.device)
        last = (rows.start + rows.q_lengths - 1).clamp(min=0)
        position = torch.minimum(rows.start[:, None] + column, last[:, None])
        view = DeviceView(position, rows.q_lengths, rows.cache_spans, None, None, slots.table, slots.cache)
        output = self.outputs(view, slice(None), rows.start, rows.start, rows.candidates)
        if slots.outputs is None:
            slots.outputs = torch.zeros_like(output)
        slots.outputs.copy_(output)

    def refresh(self, length: int) -> None:
        """Output rows of the chosen slot, from a forward over all that its row sees, which leaves keys and
        values outside the active block in the pages."""
        slots, chosen, rows = self.slots, self.slots.chosen, self.slots.rows
        start, end, reach, candidates = (
            values[chosen] for values in (rows.start, rows.end, rows.reach, rows.candidates)
        )
        column = torch.arange(length, dtype=torch.int32, device=self.device)[None]
        kept = column < start[:, None]
        if self.around:
            kept |= (column >= end[:, None]) & (column < reach[:, None])
        position = torch.minimum(column, reach[:, None] - 1)
        table = slots.table.view(self.plan.streams, len(slots), -1)[:, chosen].flatten(0, 1)
        view = DeviceView(position, reach, None, None, column.masked_fill(~kept, -1), table, slots.cache)
        output = self.outputs(view, chosen, torch.zeros_like(start), start, candidates)
        slots.outputs.view(len(slots), self.columns, -1)[chosen] = output[None]

    def commit_all(self) -> None:
        """Commit for all rows. flags of each: masks left in its block, whether a stop token ends it."""
        slots, candidates = self.slots, self.slots.rows.candidates
        self.commit(slots.outputs)
        listed = candidates >= 0
        tokens = slots.canvas.gather(1, candidates.clamp(min=0).long())
        masks = listed & (tokens == self.plan.mask_id)
        ends = listed & (tokens[..., None] == slots.stop_ids).any(-1) & (masks.cumsum(1) == 0)
        slots.flags.copy_(torch.stack([masks.sum(1), ends.any(1)], dim=1))
