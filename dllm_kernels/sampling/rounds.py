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
from dllm_kernels.ops.unmask import commit_
from dllm_kernels.sampling.canvases import Canvases, check_ids, completions, gaps, token_lists
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.job import Job, prepare
from dllm_kernels.sampling.output import SampleOutput, completion_output, infill_output
from dllm_kernels.sampling.views import StepView, view_of_blocks, view_of_canvas


def sample(
    model,
    prompts: str | list[str] | list[list[int]] | Tensor,
    *,
    tokenizer=None,
    config: SampleConfig | None = None,
    on_round: Callable[[Round], None] | None = None,
    attention_mask: Tensor | None = None,
    **overrides,
) -> SampleOutput:
    """Complete every prompt by `max_new_tokens` tokens, or up to its end token.

    model: a transformers model marked for diffusion (see `dk.load`), or a callable from ids [B, T] to logits
    [B, T, V]. prompts: text (with `tokenizer`), lists of ids of any lengths, or a Tensor [B, S] whose real
    tokens `attention_mask` tells. config: a SampleConfig; overrides: options in its place; without a config
    or block_size, blocks are of the checkpoint's own size. on_round: called after every round.
    """
    job = prepare(model, tokenizer, config, overrides)
    rows = token_lists("prompts", prompts, attention_mask, tokenizer, job.mask_id)
    check_ids("prompts", rows, job.diffusion.vocab_size)
    for index, row in enumerate(rows):
        if job.mask_id in row:
            raise ValueError(f"prompts[{index}] holds the mask token {job.mask_id}; dk.infill fills gaps")
    canvases = completions(
        rows, job.config.max_new_tokens, job.mask_id, job.fill, job.config.block_size, job.block_causal
    )
    rounds = Rounds(job, canvases, on_round, stop_ids=job.eos_ids if job.config.stop_on_eos else ())
    rounds.run()
    return completion_output(canvases, rounds.unmask_step, job.eos_ids, tokenizer, **rounds.measured())


def infill(
    model,
    canvases: str | list[str] | list[list[int]] | Tensor,
    *,
    tokenizer=None,
    config: SampleConfig | None = None,
    on_round: Callable[[Round], None] | None = None,
    attention_mask: Tensor | None = None,
    **overrides,
) -> SampleOutput:
    """Fill the mask tokens of every canvas; what is given stays as it is.

    canvases: as `prompts` of `sample`, with mask tokens where text is to come; in text, `<mask:24>` stands
    for 24 of them. Blocks count from position 0; those without masks cost nothing. No token ends a row.
    """
    if "max_new_tokens" in overrides:
        raise ValueError("max_new_tokens has no meaning for infill: what is masked gets filled")
    job = prepare(model, tokenizer, config, overrides)
    rows = token_lists("canvases", canvases, attention_mask, tokenizer, job.mask_id)
    check_ids("canvases", rows, job.diffusion.vocab_size)
    filled = gaps(rows, job.fill)
    masked = filled.ids == job.mask_id
    rounds = Rounds(job, filled, on_round)
    rounds.run()
    return infill_output(filled, masked, rounds.unmask_step, tokenizer, **rounds.measured())


@dataclass(frozen=True)
class Round:
    """What one round did, as `on_round` gets it.

    rows, positions, tokens: int64 [n], what was committed: index of the prompt, position, token id.
    canvas: int64 [B, T], all canvases as they stand; to read, not to write. forwards: forward passes so far.
    """

    rows: Tensor
    positions: Tensor
    tokens: Tensor
    canvas: Tensor
    forwards: int

    def positions_of(self, row: int) -> list[int]:
        """Positions committed in one row in this round."""
        return self.positions[self.rows == row].tolist()


@dataclass(frozen=True)
class Frame:
    """What stays the same from round to round until a row moves.

    live, rows: int64 [B], the live rows; window: int64 [B, C], the positions of their active blocks, longer
    than some; inside: bool, which are; index: window kept inside the canvas; view: of the next forward.
    """

    live: list[int]
    rows: Tensor
    window: Tensor
    inside: Tensor
    index: Tensor
    view: StepView


class Rounds:
    """The state of all rows of one job, and the rounds over those that are live.

    start, end: int64 [B], the active block; cached: leading positions whose keys and values are in pages;
    step: forwards the row took part in; quotas: what is left of the active block's schedule.
    """

    def __init__(
        self,
        job: Job,
        canvases: Canvases,
        on_round: Callable[[Round], None] | None = None,
        stop_ids: tuple[int, ...] = (),
    ):
        job.check_length(canvases)
        device, config = job.device, job.config
        canvases.ids = canvases.ids.to(device)
        self.job, self.canvases, self.ids, self.on_round = job, canvases, canvases.ids, on_round
        self.given, self.origin, self.stop, self.canvas_end = (
            bound.to(device) for bound in (canvases.given, canvases.origin, canvases.stop, canvases.end)
        )
        self.rule = config.acceptance()
        self.suppressed = (job.mask_id, *config.suppress_tokens)
        self.stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        count = len(self.ids)
        self.start, self.end, self.cached, self.step = torch.zeros(4, count, dtype=torch.int64, device=device)
        self.unmask_step = torch.full_like(self.ids, -1)
        self.blocks = [self._count_blocks(row) for row in range(count)]
        self.quotas: list[deque[int]] = [deque() for _ in range(count)]
        self.sequences: dict[int, int] = {}
        self.cache = None
        self.frame: Frame | None = None
        self.forwards = 0
        self.history = [self.ids.clone()] if config.history else None

    def run(self) -> None:
        """Every row to its end. Pages come back and the model is left as it was found, whatever happens."""
        count = len(self.ids)
        slots = self.job.config.max_batch or count
        waiting, live = deque(range(count)), []
        with self.job.denoiser.ready():
            self.cache = self.job.cache_for(self.canvases) if self.job.cached else None
            try:
                while waiting or live:
                    while waiting and len(live) < slots:
                        row = waiting.popleft()
                        if self.advance(row):
                            self.reserve(row)
                            live.append(row)
                    if live:
                        live = self.round(live)
            finally:
                for row in list(self.sequences):
                    self.release(row)

    def round(self, live: list[int]) -> list[int]:
        """One step for every live row; returns those that go on."""
        job, ids, mask_id = self.job, self.ids, self.job.mask_id
        if self.frame is None or self.frame.live != live:
            self.frame = self.frame_of(live)
        frame = self.frame
        rows, window, step = frame.rows, frame.window, self.step[frame.rows]
        canvas = ids[rows]
        masked = frame.inside & (canvas.gather(1, frame.index) == mask_id)
        slot = masked.flatten().nonzero()[:, 0]
        row, position = slot // window.shape[1], window.flatten()[slot]
        packing = frame.view.packing
        noise_ids = None
        if job.config.temperature > 0:
            noise_ids = torch.stack([rows[row], position, step[row]], dim=-1).int()
        stats, forwards = job.denoiser.statistics(
            canvas[packing.row, packing.position], frame.view, packing.place(row, position),
            temperature=job.config.temperature, seed=job.config.seed, noise_ids=noise_ids,
            suppress_tokens=self.suppressed,
        )  # fmt: skip
        accepted = commit_(
            canvas, window.masked_fill(~masked, -1).int(), _spread(stats, slot, masked.numel()), self.rule,
            mask_id=mask_id, quota=self.quota(live), step=step.int(), sequence_ids=rows.int(),
            seed=job.config.seed,
        )  # fmt: skip

        row, position = accepted.nonzero(as_tuple=True)
        if not len(row):
            raise ValueError("no token can be committed: suppress_tokens leaves none of the vocabulary")
        row, position = rows[row], window[row, position]
        ids[rows] = canvas
        self.unmask_step[row, position] = self.step[row]
        self.step[rows] += 1
        self.forwards += forwards
        if frame.view.writes:
            self.cached[rows] = self.start[rows]
            self.frame = None
        going = self.settle(frame, canvas.gather(1, frame.index))
        if self.history is not None:
            self.history.append(ids.clone())
        if self.on_round is not None:
            self.on_round(self.event(row, position))
        return going

    def settle(self, frame: Frame, tokens: Tensor) -> list[int]:
        """Rows whose block is complete move on, rows that are done leave; returns those that go on.

        tokens: int64 [B, C], the active blocks as they now are.
        """
        never = torch.iinfo(torch.int64).max
        window, rows = frame.window, frame.rows
        is_mask = frame.inside & (tokens == self.job.mask_id)
        is_end = frame.inside & (window >= self.given[rows, None]) & torch.isin(tokens, self.stop_ids)
        first_mask = torch.where(is_mask, window, never).amin(1).tolist()
        first_end = torch.where(is_end, window, never).amin(1).tolist()
        stops = self.stop[rows].tolist()
        going = []
        for row, mask_at, end_at, stop in zip(frame.live, first_mask, first_end, stops, strict=True):
            if end_at < mask_at:
                self.ids[row, end_at + 1 :] = self.job.fill
                self.unmask_step[row, end_at + 1 :] = -1
            elif mask_at < stop or self.advance(row):
                going.append(row)
                continue
            self.release(row)
        return going

    def event(self, row: Tensor, position: Tensor) -> Round:
        """What `on_round` is told, without what lies beyond a row's completion."""
        kept = position < self.stop[row]
        row, position = row[kept], position[kept]
        canvas = self.ids[:, : int(self.stop.max())]
        return Round(row, position, canvas[row, position], canvas, self.forwards)

    def frame_of(self, live: list[int]) -> Frame:
        """The next forward over the live rows: where their blocks are, what it computes and sees."""
        rows = torch.tensor(live, device=self.ids.device)
        start, end = self.start[rows], self.end[rows]
        window = start[:, None] + torch.arange(int((end - start).max()), device=rows.device)
        block_size = self.job.config.block_size if self.job.block_causal else None
        if self.cache is None:
            view = view_of_canvas(end, self.canvas_end[rows], block_size)
        else:
            table = self.cache.page_table([self.sequences[row] for row in live])
            view = view_of_blocks(start, end, self.cached[rows], block_size, self.cache, table)
        index = window.clamp(max=self.ids.shape[1] - 1)
        return Frame(live, rows, window, window < end[:, None], index, view)

    def quota(self, live: list[int]) -> Tensor | None:
        """int32 [B], how many tokens each row commits in this round; None for rules without a quota."""
        if not self.rule.needs_quota:
            return None
        return torch.tensor(
            [self.quotas[row].popleft() for row in live], dtype=torch.int32, device=self.ids.device
        )

    def advance(self, row: int) -> bool:
        """Move a row to its next block that holds a mask; False when nothing is left to fill."""
        self.frame = None
        masks = self._masks(row, int(self.end[row]))
        if not len(masks) or masks[0] >= self.stop[row]:
            return False
        size, origin = self.job.config.block_size, self.origin[row]
        self.start[row] = origin + (masks[0] - origin) // size * size
        self.end[row] = torch.minimum(self.start[row] + size, self.canvas_end[row])
        if self.rule.needs_quota:
            masks_in_block = int((masks < self.end[row]).sum())
            self.quotas[row] = deque(self.job.config.quotas(masks_in_block, self.blocks[row]))
        return True

    def reserve(self, row: int) -> None:
        """Pages for the whole of a row's canvas."""
        if self.cache is not None:
            self.sequences[row] = self.cache.admit(int(self.canvas_end[row]))

    def release(self, row: int) -> None:
        if row in self.sequences:
            self.cache.free(self.sequences.pop(row))

    def measured(self) -> dict:
        """What the output reports of the run."""
        return dict(forwards=self.forwards, row_forwards=self.step.cpu(), exact=True, history=self.history)

    def _masks(self, row: int, first: int = 0) -> Tensor:
        """int64, the masked positions of a row's canvas from `first` on."""
        return (self.ids[row, first : int(self.canvas_end[row])] == self.job.mask_id).nonzero()[:, 0] + first

    def _count_blocks(self, row: int) -> int:
        """Blocks of a row that hold masks; checked against `steps`."""
        config = self.job.config
        blocks = len(((self._masks(row) - self.origin[row]) // config.block_size).unique())
        if self.rule.needs_quota and config.steps is not None and config.steps < blocks:
            raise ValueError(
                f"steps is {config.steps}, but row {row} has {blocks} blocks of {config.block_size}"
            )
        return blocks


def _spread(stats: TokenStats, slot: Tensor, count: int) -> TokenStats:
    """The rows of `stats` at their slots among `count`."""
    if len(slot) == count:
        return stats
    return TokenStats(
        *(None if field is None else field.new_zeros(count).index_copy_(0, slot, field) for field in stats)
    )
