"""What the model predicts for each candidate: guidance, shift, filters and the logits of the step before.

One forward over a view gives output rows; this module says which rows a candidate needs and how they become
its statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.ops.token_stats import CHUNK_LOGITS, TokenStats, token_stats
from dllm_kernels.sampling.job import Job
from dllm_kernels.sampling.rules import Rule
from dllm_kernels.sampling.views import StepView


class Predictions:
    """Statistics of candidates, and what they need from one step to the next.

    before: [rows, H], with a cache and a shift the output row at start − 1 of each row's active block: it
    predicts position `start`, and later steps of the block do not compute it.
    last: [slots · width, V], the logits of the step before, for rules that compare with them; width is the
    most positions that a block has.
    """

    def __init__(self, job: Job, rule: Rule, rows: int, slots: int, width: int):
        config = job.config
        self.job, self.rows, self.slots, self.width = job, rows, slots, width
        self.options = dict(
            temperature=config.temperature, seed=config.seed, precision=job.parity.precision,
            confidence_exclude=config.begin_suppress_tokens,
        )  # fmt: skip
        barred = (job.mask_id, *config.suppress_tokens)
        if job.parity.mask_in_softmax:
            self.options |= dict(suppress_tokens=config.suppress_tokens, proposal_exclude=(job.mask_id,))
        else:
            self.options |= dict(suppress_tokens=barred)
        self.filters = {}
        if config.top_p is not None or config.top_k is not None:
            heat = config.temperature if config.temperature > 0 else 1.0
            self.filters = dict(top_p=config.top_p, top_k=config.top_k, confidence_temperature=heat)
        self.remembers = rule.needs_state
        self.before: Tensor | None = None
        self.last: Tensor | None = None

    def begin_block(self, slot: int) -> None:
        """A row in `slot` starts a block, whose first step has none before it."""
        if self.last is not None:
            self.last.view(self.slots, -1, self.last.shape[-1])[slot] = -torch.inf

    def of(
        self,
        canvas: Tensor,
        view: StepView,
        rows: Tensor,
        start: Tensor,
        candidate: tuple[Tensor, Tensor],
        noise_ids: Tensor | None,
        slot: Tensor,
    ) -> tuple[TokenStats, int]:
        """Statistics of M candidates, forwards made.

        canvas: int64 [B, T], or with guidance [2B, T], those without their prompts behind the others.
        rows, start: int64 [B], the rows' numbers and active blocks. candidate: row (0..B-1) and position,
        int64 [M] each. noise_ids: int32 [M, 3]. slot: int64 [B], of each row in `last`.
        """
        row, position = candidate
        first = view.packing.first[: len(rows)]
        source = position
        if self.job.shift:
            source = (position - 1).clamp(min=0)
            if self.job.parity.shift_in_window:
                source = torch.maximum(source, first[row])
        kept = source < first[row]  # start − 1, computed by an earlier forward of this block
        edge = row.new_zeros(0)
        if self.job.shift and view.pages is not None:
            edge = (first < start).nonzero()[:, 0]
        row_of, source_of = torch.cat([row[~kept], edge]), torch.cat([source[~kept], start[edge] - 1])
        output, forwards = self._outputs(canvas, view, row_of, source_of, len(rows))
        if len(edge):
            if self.before is None:
                self.before = output.new_zeros(self.rows, output.shape[1])
            output, self.before[rows[edge]] = output[: -len(edge)], output[-len(edge) :]
        if len(output) < len(row):
            computed, output = output, self.before[rows[row]]
            output[~kept] = computed
        place = slot[row] * self.width + position - start[row]
        return self._statistics(output, noise_ids, place), forwards

    def _outputs(self, canvas, view, row, position, count) -> tuple[Tensor, int]:
        """Output rows of these positions; with guidance (1 + s)·conditional − s·unconditional."""
        packing, scale = view.packing, self.job.config.cfg_scale
        ids, places = canvas[packing.row, packing.position][None], packing.place(row, position)
        if not scale:
            return self.job.denoiser.outputs(ids, view, places)
        places = torch.cat([places, packing.place(row + count, position)])
        output, forwards = self.job.denoiser.outputs(ids, view, places)
        conditional, unconditional = output.chunk(2)
        return torch.lerp(unconditional, conditional, 1 + scale), forwards

    def _statistics(self, output: Tensor, noise_ids: Tensor | None, place: Tensor) -> TokenStats:
        """Of output rows whose logits of the step before lie at `place` in `last`."""
        denoiser = self.job.denoiser
        if not (self.filters or self.remembers):
            return denoiser.statistics(output, noise_ids=noise_ids, **self.options)
        size = max(1, CHUNK_LOGITS // (self.job.diffusion.vocab_size or 1 << 16))
        noise = [None] * len(output) if noise_ids is None else noise_ids.split(size)
        chunks, options = [], self.options | self.filters
        for some, at, ids in zip(output.split(size), place.split(size), noise, strict=False):
            logits = denoiser.logits(some)
            chunks.append(token_stats(logits, previous=self._last(logits, at), noise_ids=ids, **options))
        return TokenStats(
            *(None if field[0] is None else torch.cat(field) for field in zip(*chunks, strict=True))
        )

    def _last(self, logits: Tensor, place: Tensor) -> Tensor | None:
        """The logits of the step before, in whose place these are put."""
        if not self.remembers:
            return None
        if self.last is None:
            self.last = logits.new_full((self.slots * self.width, logits.shape[1]), -torch.inf)
        before = self.last[place]
        self.last[place] = logits
        return before
