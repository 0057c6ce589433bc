"""Statistics of output rows: noise, barred tokens, filters, and the logits of the step before."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.ops.token_stats import CHUNK_LOGITS, TokenStats, token_stats
from dllm_kernels.sampling.job import Job
from dllm_kernels.sampling.rules import Rule


class Statistics:
    """What one job asks of an output row. The logits are stored, in chunks of rows, only for filters and for
    rules that compare with the step before.

    last: [slots · width, V], the logits of the step before; width is the most positions that a block has.
    """

    def __init__(self, job: Job, rule: Rule, slots: int, width: int):
        config = job.config
        self.job, self.slots, self.width = job, slots, width
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
        self.last: Tensor | None = None

    def begin_block(self, slot: int) -> None:
        """A row in `slot` starts a block, whose first step has none before it."""
        if self.last is not None:
            self.last.view(self.slots, -1, self.last.shape[-1])[slot] = -torch.inf

    def of(self, output: Tensor, noise_ids: Tensor | None, place: Tensor | None = None) -> TokenStats:
        """Of output rows [N, H]. noise_ids: int32 [N, 3]. place: int64 [N], where their logits of the step
        before lie in `last`, for rules that compare."""
        denoiser = self.job.denoiser
        if not (self.filters or self.remembers):
            return denoiser.statistics(output, noise_ids=noise_ids, **self.options)
        size = max(1, CHUNK_LOGITS // (self.job.diffusion.vocab_size or 1 << 16))
        chunks, options = [], self.options | self.filters
        for first in range(0, max(len(output), 1), size):
            some = slice(first, first + size)
            logits = denoiser.logits(output[some])
            before = self._last(logits, place[some]) if self.remembers else None
            noise = None if noise_ids is None else noise_ids[some]
            chunks.append(token_stats(logits, previous=before, noise_ids=noise, **options))
        return TokenStats(
            *(None if field[0] is None else torch.cat(field) for field in zip(*chunks, strict=True))
        )

    def _last(self, logits: Tensor, place: Tensor) -> Tensor:
        """The logits of the step before, in whose place these are put."""
        if self.last is None:
            self.last = logits.new_full((self.slots * self.width, logits.shape[1]), -torch.inf)
        before = self.last[place]
        self.last[place] = logits
        return before
