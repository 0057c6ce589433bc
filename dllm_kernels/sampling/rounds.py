"""The loop: rows are admitted, a round gives each live row one step at its own block, finished rows leave.

Rows are independent: each has its own prompt length, active block, step and end. A round is one view, one
forward over it and one commit into the canvases. Which cache is used changes the view, not the loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels.ops.token_stats import TokenStats
from dllm_kernels.sampling.acceptance import Acceptance, rule_of
from dllm_kernels.sampling.block_steps import BlockSteps
from dllm_kernels.sampling.canvases import Canvases
from dllm_kernels.sampling.frame import Frame
from dllm_kernels.sampling.job import Job
from dllm_kernels.sampling.predictions import Predictions
from dllm_kernels.sampling.row_pages import RowPages
from dllm_kernels.sampling.views import Rows, view_of

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
    """The state of all rows of one job, and the rounds over those that are live.

    start, end: int64 [B], the active block; cached: leading positions whose keys and values are final and in
    pages; step: forwards the row took part in; blocks: how each row's active block goes on. open: bool
    [B, T], what was masked at first: all else is prompt.
    """

    def __init__(
        self,
        job: Job,
        canvases: Canvases,
        on_round: Callable[[Round], None] | None = None,
        stop_ids: tuple[int, ...] = (),
    ):
        job.check_length(canvases)
        device = job.device
        canvases.ids = canvases.ids.to(device)
        self.job, self.canvases, self.ids, self.on_round = job, canvases, canvases.ids, on_round
        self.given, self.origin, self.stop, self.canvas_end = (
            bound.to(device) for bound in (canvases.given, canvases.origin, canvases.stop, canvases.end)
        )
        self.open = self.ids == job.mask_id
        self.block_size = job.config.block_size if job.block_causal else None
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        count = len(self.ids)
        self.start, self.end, self.cached, self.step = torch.zeros(4, count, dtype=torch.int64, device=device)
        self.unmask_step = torch.full_like(self.ids, -1)
        self.blocks_of = [self._count_blocks(row) for row in range(count)]
        self.rule = rule_of(job.config, self.blocks_of)
        self.acceptance = Acceptance(job, self.rule, self.open, self.canvas_end)
        self.blocks = [BlockSteps() for _ in range(count)]
        self.slots = min(job.config.max_batch or count, count)
        self.slot_of: dict[int, int] = {}
        width = min(job.config.block_size, self.ids.shape[1])
        self.predictions = Predictions(job, self.rule, count, self.slots, width)
        self.pages: RowPages | None = None
        self.frame: Frame | None = None
        self.forwards = 0
        self.history = [self.ids.clone()] if job.config.history else None

    def run(self) -> None:
        """Every row to its end. Pages come back and the model is left as it was found, whatever happens."""
        waiting, live = deque(range(len(self.ids))), []
        with self.job.denoiser.ready():
            if self.job.scheme.keeps is not None:
                job, canvases = self.job, self.canvases
                cache = job.cache_of(job.pages_for(canvases.end))
                self.pages = RowPages(
                    cache, job.streams, self.ids.clone(), job.shareable(canvases), job.config.block_size
                )
            try:
                while waiting or live:
                    live += self.admit(waiting, self.slots - len(live))
                    if live:
                        live = self.round(live)
            finally:
                if self.pages is not None:
                    self.pages.release_all()

    def admit(self, waiting: deque[int], room: int) -> list[int]:
        """Rows that go live, up to `room` of them; the rest goes on waiting, in order."""
        admitted, held_back = [], []
        while waiting and len(admitted) < room:
            row = waiting.popleft()
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
        job = self.job
        frame = self.frame = self.frame_of(live)
        rows, window, step = frame.rows, frame.window, self.step[frame.rows]
        blocks = [self.blocks[row] for row in live]
        canvas = self.ids[rows]
        masked = frame.inside & (canvas.gather(1, frame.index) == job.mask_id)
        listed = self.acceptance.candidates(frame, blocks, canvas, masked)

        slot = listed.flatten().nonzero()[:, 0]
        row, position = slot // window.shape[1], window.flatten()[slot]
        noise_ids = None
        if job.config.temperature > 0:
            noise_ids = torch.stack([rows[row], position, step[row]], dim=-1).int()
        stats, forwards = self.predictions.of(
            self.streams_of(canvas, rows), frame.view, rows, self.start[rows], (row, position), noise_ids,
            torch.tensor([self.slot_of[row] for row in live], device=rows.device),
        )  # fmt: skip
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
        if frame.view.writes:
            self.cached[rows] = self.start[rows]
            self.frame = None
        going = self.settle(frame, canvas.gather(1, frame.index), masked, accepted)
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
        is_mask = frame.inside & (tokens == self.job.mask_id)
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
                self.ids[row, end_at + 1 :] = self.job.fill
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
        most = self.job.config.max_post_steps
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
        canvas = self.ids[:, : len(place)].masked_fill(place >= self.stop[:, None], self.job.fill)
        return Round(row, position, canvas[row, position], canvas, self.forwards)

    def frame_of(self, live: list[int]) -> Frame:
        """The next forward over the live rows: where their blocks are, what it computes and sees."""
        stale = [self.blocks[row].stale(self.job.config.refresh_every) for row in live]
        if self.frame is not None and self.frame.live == live and self.frame.stale == stale:
            return self.frame
        rows = torch.tensor(live, device=self.ids.device)
        start, end, reach = self.start[rows], self.end[rows], self.canvas_end[rows]
        if self.block_size is not None:
            reach = end
        elif self.job.config.suffix_window is not None:
            reach = torch.minimum(reach, end + self.job.config.suffix_window)
        window = start[:, None] + torch.arange(int((end - start).max()), device=rows.device)
        state = Rows(
            start, end, reach, self.cached[rows], torch.tensor(stale, device=rows.device), self.origin[rows]
        )
        if self.job.streams == 2:
            state = state.twice()
        cached = () if self.pages is None else (self.pages.cache, self.pages.table(live))
        view = view_of(self.job.scheme, state, self.block_size, *cached)
        index = window.clamp(max=self.ids.shape[1] - 1)
        return Frame(live, stale, rows, start, window, window < end[:, None], index, view)

    def streams_of(self, canvas: Tensor, rows: Tensor) -> Tensor:
        """The canvases [B, T] of the live rows; with guidance those without their prompts behind them."""
        if self.job.streams == 1:
            return canvas
        kept = torch.tensor(self.job.config.cfg_keep_tokens, dtype=torch.int64, device=canvas.device)
        hidden = ~self.open[rows] & ~torch.isin(canvas, kept)
        return torch.cat([canvas, canvas.masked_fill(hidden, self.job.mask_id)])

    def advance(self, row: int) -> bool:
        """Move a row to its next block that holds a mask; False when nothing is left to fill."""
        self.frame = None
        masks = self._masks(row, int(self.end[row]))
        if not len(masks) or masks[0] >= self.stop[row]:
            return False
        size, origin = self.job.config.block_size, self.origin[row]
        start = origin + (masks[0] - origin) // size * size
        self.start[row], self.end[row] = start, torch.minimum(start + size, self.canvas_end[row])
        self.blocks[row] = BlockSteps()
        count = int((masks < self.end[row]).sum())
        if self.acceptance.needs_quota:
            quotas = self.job.config.quotas(count, self.blocks_of[row], (row, int(start)))
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
            forwards=self.forwards, row_forwards=self.step.cpu(), exact=not self.job.config.approximate,
            history=self.history,
        )  # fmt: skip

    def _masks(self, row: int, first: int = 0) -> Tensor:
        """int64, the masked positions of a row's canvas from `first` on."""
        return (self.ids[row, first : int(self.canvas_end[row])] == self.job.mask_id).nonzero()[:, 0] + first

    def _count_blocks(self, row: int) -> int:
        """Blocks of a row that hold masks, over which its steps are spread."""
        if self.job.parity.every_block_counts:
            return -(-int((self.stop - self.origin).max()) // self.job.config.block_size)
        return len(((self._masks(row) - self.origin[row]) // self.job.config.block_size).unique())


def _spread(stats: TokenStats, slot: Tensor, count: int) -> TokenStats:
    """The rows of `stats` at their slots among `count`."""
    if len(slot) == count:
        return stats
    return TokenStats(
        *(None if field is None else field.new_zeros(count).index_copy_(0, slot, field) for field in stats)
    )
