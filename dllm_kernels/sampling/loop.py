"""The loop: rows are admitted, each step is one forward for all live rows at their own blocks, rows leave.

Rows are independent: each has its own prompt length, active block, step and end. Which cache is used changes
the view of a forward, not the loop. `Loop` admits rows, moves them from block to block and ends them.
`HostLoop` serves every rule, cache, callback and device, and looks at every row after every step. The loops
of graph_loop.py replay their steps as CUDA graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels.ops.token_stats import TokenStats
from dllm_kernels.sampling.output import Finished
from dllm_kernels.sampling.plan import Plan
from dllm_kernels.sampling.prefix_cache import PrefixCache
from dllm_kernels.sampling.prompts import Canvases
from dllm_kernels.sampling.slots import RowPages
from dllm_kernels.sampling.step import (
    Acceptance,
    Frame,
    LiveRow,
    Logprobs,
    Predictions,
    Statistics,
    block_flags,
    noise_ids,
    rule_of,
)
from dllm_kernels.sampling.views import Rows, view_of

NO_TOKEN = "no token can be committed: suppress_tokens leaves none of the vocabulary"


@dataclass(frozen=True)
class Round:
    """The result of one step of all live rows, as `on_round` gets it.

    rows, positions, tokens: int64 [n], what was committed: index of the prompt, position, token id.
    probabilities: float32 [n], those of the tokens, by the softmax that the rule's confidences come from.
    canvas: int64 [B, T], a copy of all canvases as they stand. forwards: forward passes so far.
    """

    rows: Tensor
    positions: Tensor
    tokens: Tensor
    probabilities: Tensor
    canvas: Tensor
    forwards: int

    def positions_of(self, row: int) -> list[int]:
        """Return the positions committed in one row in this round."""
        return self.positions[self.rows == row].tolist()


class Loop(ABC):
    """All rows of one call, some of them in slots.

    ids, unmask_step: as of `Finished`. given, origin, stop, end, numbers: of `Canvases`, as lists. live: the
    rows in slots, by slot, in the order in which they came.
    """

    def __init__(
        self,
        plan: Plan,
        canvases: Canvases,
        stop_ids: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
    ):
        plan.check_length(canvases)
        self.plan, self.canvases, self.stop_ids = plan, canvases, stop_ids
        self.ids = canvases.ids.to(device, copy=True)
        self.unmask_step = torch.full_like(self.ids, -1)
        self.given, self.origin, self.stop, self.end, self.numbers = (
            values.tolist()
            for values in (canvases.given, canvases.origin, canvases.stop, canvases.end, canvases.numbers)
        )
        count = len(self.ids)
        self.slot_count = min(plan.config.max_batch or count, count)
        self.live: dict[int, LiveRow] = {}
        self.row_forwards, self.forwards, self.history = [0] * count, 0, None
        self.logprobs: Logprobs | None = None
        longest = int((canvases.stop - canvases.origin).max())
        self.blocks_of = [self._count_blocks(row, longest) for row in range(count)]
        self.rule = rule_of(plan.config, self.blocks_of)
        self.needs_quota = plan.parity.needs_quota(self.rule, plan.scheme.exact)
        self.pages: RowPages | None = None

    def run(self) -> Finished:
        """Take every row to its end."""
        waiting = deque(row for row in range(len(self.ids)) if self.open(row))
        with self.prepared():
            while waiting or self.live:
                # 1. Rows that wait take free slots, and pages where there is a cache.
                self.admit(waiting)
                if self.live:
                    self.step()
        return Finished(
            self.ids, self.unmask_step, self.forwards, torch.tensor(self.row_forwards, device="cpu"),
            not self.plan.config.approximate, self.history, self.logprobs,
        )  # fmt: skip

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Within, there is all that steps need. Afterwards pages have come back and the model is as it was
        found, whatever happened."""
        with self.plan.runner.ready():
            yield

    @abstractmethod
    def place(self, slot: int, row: int) -> bool:
        """Put a row into a free slot, in `live`; False: it must wait for others."""

    @abstractmethod
    def step(self) -> None:
        """One step of every live row; those that are done leave."""

    @abstractmethod
    def begun(self, slot: int, masks: list[int]) -> None:
        """The row in `slot` has just begun a block; masks: the positions to fill."""

    def admit(self, waiting: deque[int]) -> None:
        """Put rows into the free slots; those that must wait for others go on waiting, in their order."""
        held_back = []
        for slot in range(self.slot_count):
            while waiting and slot not in self.live:
                row = waiting.popleft()
                if not self.place(slot, row):
                    held_back.append(row)
        waiting.extendleft(reversed(held_back))

    def begin_block(self, slot: int) -> bool:
        """Move a row to its next block with a mask; return False when nothing is left to fill."""
        live, config = self.live[slot], self.plan.config
        row = live.row
        places = self.open(row, live.end)
        if not places or places[0] >= self.stop[row]:
            return False
        start = places[0] - (places[0] - self.origin[row]) % config.block_size
        end = reach = min(start + config.block_size, self.end[row])
        if not self.plan.block_causal:
            window = config.suffix_window
            reach = self.end[row] if window is None else min(end + window, self.end[row])
        masks = [position for position in self.masks(row, start) if position < end]
        quotas = ()
        if self.needs_quota:
            quotas = config.quotas(len(masks), self.blocks_of[row], (self.numbers[row], start))
        live.begin(start, end, reach, len(masks), quotas)
        self.begun(slot, masks)
        return True

    def move(self, flags: list[list[int]], staying: set[int] = frozenset()) -> None:
        """After a step, rows whose block is full go on to the next one, and rows that are done leave.

        flags: of each live row, the masks left in its block, and whether an end token stands before all of
        them. staying: slots whose rows go on in their blocks.
        """
        for (slot, live), (masks, ended) in zip(list(self.live.items()), flags, strict=True):
            live.masks = masks
            live.went_on()
            if slot in staying or (masks and not ended):
                continue
            if ended or not self.begin_block(slot):
                self.leave(slot)

    def leave(self, slot: int) -> None:
        """Let a row that is done go: its slot and its pages are free."""
        live = self.live.pop(slot)
        self.row_forwards[live.row] = live.step
        self._fill_after_end(live.row)
        if self.pages is not None:
            self.pages.release(live.row)

    def masks(self, row: int, first: int = 0) -> list[int]:
        """Return the masked positions of a row's canvas from `first` on."""
        masked = self.ids[row, first : self.end[row]] == self.plan.mask_id
        return (masked.nonzero()[:, 0] + first).tolist()

    def open(self, row: int, first: int = 0) -> list[int]:
        """Return the positions of a row's canvas from `first` on that steps may write: masks and drafts."""
        if self.canvases.draft is None:
            return self.masks(row, first)
        masked = self.ids[row, first : self.end[row]].cpu() == self.plan.mask_id
        return ((masked | self.canvases.draft[row, first : self.end[row]]).nonzero()[:, 0] + first).tolist()

    def _count_blocks(self, row: int, longest: int) -> int:
        """Return the number of blocks that a row's steps are spread over: those with masks."""
        size, origin = self.plan.config.block_size, self.origin[row]
        blocks = {(position - origin) // size for position in self.open(row)}
        return self.plan.parity.blocks_counted(len(blocks), longest, size)

    def _fill_after_end(self, row: int) -> None:
        """Fill up what stands after an end token with no mask before it."""
        if not self.stop_ids:
            return
        ids, given, stop = self.ids[row], self.given[row], self.stop[row]
        ends = torch.isin(ids[given:stop], torch.tensor(self.stop_ids, dtype=ids.dtype, device=ids.device))
        if not ends.any():
            return
        first = given + int(ends.int().argmax())
        if not (ids[given:first] == self.plan.mask_id).any():
            ids[first + 1 :] = self.canvases.fill
            self.unmask_step[row, first + 1 :] = -1


class HostLoop(Loop):
    """The loop whose rows the host moves, for whatever `plan` asks.

    ids: on the model's device. cached: for each row, how many leading positions have final keys and values in
    pages. blank: bool [B, T], what was masked or a draft at first: all else is prompt.
    """

    def __init__(
        self,
        plan: Plan,
        canvases: Canvases,
        on_round: Callable[[Round], None] | None = None,
        stop_ids: tuple[int, ...] = (),
        prefix_cache: PrefixCache | None = None,
    ):
        super().__init__(plan, canvases, stop_ids, plan.device)
        self.on_round, self.prefix_cache = on_round, prefix_cache
        self.block_size = plan.config.block_size if plan.block_causal else None
        self.blank = self.ids == plan.mask_id
        if canvases.draft is not None:
            self.blank |= canvases.draft.to(plan.device)
        kept = torch.tensor(plan.config.cfg_keep_tokens, dtype=torch.int64, device=plan.device)
        self.hidden = ~self.blank & ~torch.isin(self.ids, kept) if plan.streams == 2 else None
        self.stops = torch.tensor(stop_ids, dtype=torch.int64, device=plan.device)
        self.acceptance = Acceptance(plan, self.rule, self.blank, canvases.end.to(plan.device))
        self.width = min(plan.config.block_size, self.ids.shape[1])
        self.predictions = Predictions(plan, self.slot_count)
        self.statistics = Statistics(plan, self.rule, self.slot_count, self.width, canvases.allowed)
        if plan.config.logprobs is not None:
            self.logprobs = Logprobs.of_nothing(self.ids, 0)
        self.scaling = [plan.runner.scaling_of(end) for end in self.end]
        self.cached = [0] * len(self.ids)
        self.frame: Frame | None = None
        self.history = [self.ids.clone()] if plan.config.history else None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        plan, canvases, kept = self.plan, self.canvases, nullcontext()
        with super().prepared():
            if self.prefix_cache is not None:
                kept = self.prefix_cache.rows_of(plan, canvases, self.ids.clone(), self.scaling)
            elif plan.scheme.keeps is not None:
                cache, shareable = plan.cache_of(plan.pages_for(canvases.end)), plan.shareable(canvases)
                self.pages = RowPages(
                    cache, plan.streams, self.ids.clone(), shareable, plan.config.block_size
                )
            with kept as pages:
                self.pages = pages or self.pages
                try:
                    yield
                finally:
                    if self.pages is not None:
                        for live in self.live.values():  # those of a call that is interrupted
                            self.keep_pages(live.row)
                        self.pages.release_all()

    def place(self, slot: int, row: int) -> bool:
        if any(self.scaling[row] != self.scaling[live.row] for live in self.live.values()):
            return False
        if self.pages is not None:
            cached = self.pages.admit(row, self.end[row], self.cached)
            if cached is None:
                return False
            self.cached[row] = cached
        self.live[slot] = LiveRow(row)
        if not self.begin_block(slot):
            self.leave(slot)
        return True

    def begun(self, slot: int, masks: list[int]) -> None:
        self.statistics.begin_block(slot)
        self.frame = None

    def leave(self, slot: int) -> None:
        if self.pages is not None:
            self.keep_pages(self.live[slot].row)
        super().leave(slot)

    def keep_pages(self, row: int) -> None:
        """Leave what is final of a row's keys and values to later calls, where those can use it."""
        self.pages.keep(row, self.ids[row, : self.cached[row]])

    def step(self) -> None:
        plan = self.plan
        # 2. Where the rows stand: the positions of their active blocks, and what the next forward sees.
        frame = self.frame = self.frame_of_live()
        rows, window = frame.rows, frame.window
        step = torch.tensor([row.step for row in frame.live], device=rows.device)
        if self.scaling[frame.live[0].row]:
            plan.runner.length = self.end[frame.live[0].row]

        # 3. Candidates: the positions that this step may fill, or edit.
        canvas = self.ids[rows]
        masked = frame.inside & (canvas.gather(1, frame.index) == plan.mask_id)
        listed = self.acceptance.candidates(frame, canvas, masked)
        wanted = listed.flatten().nonzero()[:, 0]
        noise = noise_ids(plan, frame.numbers, window, step)

        # 4. One forward, and the token and confidence of each candidate.
        output, forwards = self.predictions.of(
            canvas, None if self.hidden is None else self.hidden[rows], frame.view,
            frame.view.packing.first[: len(rows)], frame.start, window, frame.slots, wanted,
        )  # fmt: skip
        row, column = wanted // window.shape[1], wanted % window.shape[1]
        places = rows[row], window[row, column]
        stats = self.statistics.of(
            output, None if noise is None else noise[wanted], frame.slots[row] * self.width + column, places
        )

        # 5. The rule writes what it accepts into the canvas.
        stats = _spread(stats, wanted, listed.numel())
        accepted = self.acceptance.commit_(frame, canvas, listed, stats, step)
        if bool((masked.any(1) & ~accepted.any(1)).any()):
            raise ValueError(NO_TOKEN)
        row, column = accepted.nonzero(as_tuple=True)
        at, position = rows[row], window[row, column]
        self.ids[rows] = canvas
        self.unmask_step[at, position] = step[row]
        if self.logprobs is not None:
            self.record_logprobs(output[accepted.flatten()[wanted]], at, position)
        self.forwards += forwards

        # 6. What the forward left in the cache is final up to the active block.
        if frame.view.writes:
            for live in frame.live:
                self.cached[live.row] = live.start
            self.frame = None

        # 7. Rows whose block is full go on to the next one; rows that are done give slot and pages back.
        tokens = canvas.gather(1, frame.index)
        masks = frame.inside & (tokens == plan.mask_id)
        ends = frame.inside & (window >= frame.given[:, None]) & torch.isin(tokens, self.stops)
        flags = block_flags(masks, window < frame.stop[:, None], ends)
        self.move(flags.tolist(), self.editing(masked, masks, accepted))

        # 8. Whoever watches is told.
        if self.history is not None:
            self.history.append(self.ids.clone())
        if self.on_round is not None:
            self.on_round(self.event(at, position, stats.prob[accepted.flatten()]))

    def editing(self, before: Tensor, after: Tensor, accepted: Tensor) -> set[int]:
        """Return the slots of rows that go on in their blocks because what stands may still be edited.

        before, after: bool [B, C], the masks at the beginning and the end of the step; accepted: its changes.
        """
        if self.rule.name != "edit":
            return set()
        flags = (tensor.any(1).tolist() for tensor in (before, after, accepted))
        most = self.plan.config.max_post_steps
        return {
            slot
            for (slot, live), had_masks, has_masks, changed in zip(self.live.items(), *flags, strict=True)
            if has_masks or not live.is_edited(had_masks, changed, most)
        }

    def record_logprobs(self, output: Tensor, row: Tensor, position: Tensor) -> None:
        """Record those of the tokens at positions [n] of canvases [n], from their output rows [n, H]."""
        if len(output):
            tokens, count = self.ids[row, position], self.plan.config.logprobs
            found = self.statistics.log_probabilities(output, tokens, count, (row, position))
            if self.logprobs.top.shape[2] != found.top.shape[1]:  # the first ones, of at most V tokens
                self.logprobs = Logprobs.of_nothing(self.ids, found.top.shape[1])
            for record, values in zip(self.logprobs, found, strict=True):
                record[row, position] = values

    def event(self, row: Tensor, position: Tensor, probabilities: Tensor) -> Round:
        """Return what `on_round` is told, without what lies beyond a row's completion."""
        stop = self.canvases.stop.to(self.ids.device)
        kept = position < stop[row]
        row, position, probabilities = row[kept], position[kept], probabilities[kept]
        place = torch.arange(max(self.stop), device=self.ids.device)
        canvas = self.ids[:, : len(place)].masked_fill(place >= stop[:, None], self.plan.fill)
        return Round(row, position, canvas[row, position], probabilities, canvas, self.forwards)

    def frame_of_live(self) -> Frame:
        """Return where the blocks of the live rows are, and what the next forward computes and sees."""
        live, device = list(self.live.values()), self.ids.device
        stale = [row.stale(self.plan.config.refresh_every) for row in live]
        if self.frame is not None and self.frame.live == live and self.frame.stale == stale:
            return self.frame
        slots, rows, start, end, reach, cached, origin, given, stop, numbers = torch.tensor(
            [
                [
                    slot,
                    row.row,
                    row.start,
                    row.end,
                    row.reach,
                    self.cached[row.row],
                    *self._of_canvas(row.row),
                ]
                for slot, row in self.live.items()
            ],
            device=device,
        ).unbind(1)
        window = start[:, None] + torch.arange(max(row.end - row.start for row in live), device=device)
        state = Rows(start, end, reach, cached, torch.tensor(stale, device=device), origin)
        if self.plan.streams == 2:
            state = state.twice()
        pages = () if self.pages is None else (self.pages.cache, self.pages.table([row.row for row in live]))
        view = view_of(self.plan.scheme, state, self.block_size, *pages)
        index = window.clamp(max=self.ids.shape[1] - 1)
        return Frame(
            live, stale, slots, rows, numbers, given, stop, start, window, window < end[:, None], index, view
        )

    def _of_canvas(self, row: int) -> tuple[int, ...]:
        return self.origin[row], self.given[row], self.stop[row], self.numbers[row]


def _spread(stats: TokenStats, wanted: Tensor, count: int) -> TokenStats:
    """Return the rows of `stats` in their places among `count`."""
    if len(wanted) == count:
        return stats
    return TokenStats(
        *(None if field is None else field.new_zeros(count).index_copy_(0, wanted, field) for field in stats)
    )
