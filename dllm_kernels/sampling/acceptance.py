"""Which positions of the active blocks are candidates of a step, and which of them it commits.

What a rule accepts is written in csrc/core/acceptance.h. Here stands what goes before: which positions are
listed for it, with which quota and in which step of its own time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.ops.token_stats import TokenStats
from dllm_kernels.ops.unmask import commit_
from dllm_kernels.sampling.block_steps import BlockSteps
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.frame import Frame
from dllm_kernels.sampling.job import Job
from dllm_kernels.sampling.rules import Rule


class Acceptance:
    """The rule of one job. open: bool [B, T], what was masked at first, all else is prompt; ends: int64 [B],
    the canvases' lengths; state: int32 [B, T], counters of a rule that needs them."""

    def __init__(self, job: Job, rule: Rule, open: Tensor, ends: Tensor):
        self.job, self.rule, self.open, self.ends = job, rule, open, ends
        self.state = torch.zeros_like(open, dtype=torch.int32) if rule.needs_state else None
        parity = job.parity
        self.start_alone = parity.refresh_commits_start and not job.scheme.exact
        self.within_quota = parity.threshold_within_quota and job.scheme.exact and rule.name == "threshold"
        self.needs_quota = rule.needs_quota or self.within_quota
        drawn = rule.alg_temp > 0 or rule.confidence == "random"
        ranked = parity.ranked_by_topk is not None and (rule.name == "quota" or self.within_quota)
        self.by_topk = ranked and not drawn

    def candidates(self, frame: Frame, blocks: list[BlockSteps], canvas: Tensor, masked: Tensor) -> Tensor:
        """bool [B, C], the positions whose statistics the rule needs; masked: those that hold a mask."""
        if self.rule.name == "edit":
            return frame.inside & self.open[frame.rows].gather(1, frame.index)
        if self.rule.name == "bernoulli":
            return self._drawn(frame, blocks, canvas, masked)
        if self.start_alone:
            stale = torch.tensor(frame.stale, device=masked.device)[:, None]
            return masked & (~stale | (frame.window == frame.start[:, None]))
        return masked

    def commit_(
        self,
        frame: Frame,
        blocks: list[BlockSteps],
        canvas: Tensor,
        listed: Tensor,
        stats: TokenStats,
        step: Tensor,
    ) -> Tensor:
        """Write what the rule accepts of `listed` into canvas [B, T]; accepted, bool [B, C].

        stats: of all B·C positions. step: int64 [B], forwards that the rows took part in.
        """
        common = dict(
            mask_id=self.job.mask_id, seed=self.job.config.seed, sequence_ids=frame.rows.int(),
            step=self._index(blocks, step.device) if self.rule.name == "bernoulli" else step.int(),
        )  # fmt: skip
        quota = self._quota(blocks, listed)
        if self.by_topk:
            listed = self._taken_by_topk(frame, listed, stats, quota)
        if self.within_quota:
            quota = None
        state = None if self.state is None else self.state[frame.rows]
        accepted = commit_(
            canvas, frame.positions(listed), stats, self.rule, quota=quota, state=state, **common
        )
        if state is not None:
            self.state[frame.rows] = state
        if self.job.parity.factor_takes_all and self.rule.name == "factor":
            left = listed & ~accepted
            left &= left.sum(1, keepdim=True) == 1
            accepted |= commit_(canvas, frame.positions(left), stats, Rule.quota(), quota=1, **common)
        return accepted

    def _quota(self, blocks: list[BlockSteps], listed: Tensor) -> Tensor | None:
        """int32 [B], how many tokens each row commits; None for rules without a quota."""
        if not self.needs_quota:
            return None
        quotas = [block.next_quota(listed.shape[1]) for block in blocks]
        if self.within_quota:
            masks = listed.sum(1).tolist()
            quotas = [count - sum(block.quotas) for count, block in zip(masks, blocks, strict=True)]
        return torch.tensor(quotas, dtype=torch.int32, device=listed.device)

    def _taken_by_topk(self, frame: Frame, listed: Tensor, stats: TokenStats, quota: Tensor) -> Tensor:
        """bool [B, C]: what torch.topk takes of `listed` where it ranks all positions that were computed, in
        canvases padded to one width. Its order among equals follows from where they stand."""
        packing, width = frame.view.packing, self.open.shape[1]
        first, end = packing.first[: len(listed)], self.ends[frame.rows]
        last = first + packing.length[: len(listed)]
        pad = width - end if self.job.parity.ranked_by_topk == "left" else torch.zeros_like(end)
        low = torch.where(first > 0, first + pad, 0).tolist()
        high = torch.where(last < end, last + pad, width).tolist()
        surest = {"prob": stats.prob, "margin": stats.margin, "entropy": -stats.entropy}
        confidence = surest[self.rule.confidence].view_as(listed).masked_fill(~listed, -torch.inf)
        column = frame.window + pad[:, None]
        ranked = confidence.new_full((len(listed), width + listed.shape[1]), -torch.inf)
        ranked = ranked.scatter_(1, column, confidence).cpu()
        taken = torch.zeros_like(ranked, dtype=torch.bool)
        for row, most in enumerate(quota.tolist()):
            some = ranked[row, low[row] : high[row]]
            taken[row, low[row] + some.topk(min(most, len(some))).indices] = True
        return listed & taken.to(listed.device).gather(1, column)

    def _index(self, blocks: list[BlockSteps], device: torch.device) -> Tensor:
        return torch.tensor([block.index for block in blocks], dtype=torch.int32, device=device)

    def _drawn(self, frame: Frame, blocks: list[BlockSteps], canvas: Tensor, masked: Tensor) -> Tensor:
        """bool [B, C]: what rule `bernoulli` draws of the masks in each row's next step.

        The draw depends on no statistics, so that it is known beforehand, and a step that draws nothing is
        passed over without a forward. Every row draws something in its last step.
        """
        zeros = torch.zeros(masked.numel(), dtype=torch.float32, device=masked.device)
        anything = TokenStats(
            torch.full_like(zeros, int(self.job.mask_id == 0), dtype=torch.int64), *[zeros] * 4
        )
        while True:
            found = commit_(
                canvas.clone(), frame.positions(masked), anything, self.rule, mask_id=self.job.mask_id,
                step=self._index(blocks, masked.device), sequence_ids=frame.rows.int(),
                seed=self.job.config.seed,
            )  # fmt: skip
            idle = (~found.any(1)).tolist()
            if not any(idle):
                return found
            for block, nothing in zip(blocks, idle, strict=True):
                block.index += nothing


def rule_of(config: SampleConfig, blocks: list[int]) -> Rule:
    """The rule of rows with so many blocks each; refuses `steps` that do not go round."""
    rule = config.acceptance(config.steps_of_block(max(blocks, default=1) or 1))
    if config.steps is None:
        return rule
    if rule.needs_quota or rule.name == "bernoulli":
        for row, count in enumerate(blocks):
            if config.steps < count:
                raise ValueError(
                    f"steps is {config.steps}, but row {row} has {count} blocks of {config.block_size}"
                )
    if config.rule == "bernoulli" and len({config.steps_of_block(count) for count in blocks if count}) > 1:
        raise ValueError(
            f"steps is {config.steps} for rows of {sorted({*blocks})} blocks, whose steps would differ: rule "
            '"bernoulli" has one number of steps for all; give steps_per_block'
        )
    return rule
