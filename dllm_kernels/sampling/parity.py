"""Parity modes: what a reference implementation does besides its options, so that tokens come out as there.

`Parity` is what this library itself does, and where a reference differs one of its fields says so. The
sampler asks its methods, not its fields. A mode is a row of the table `PARITY`. All hold at temperature 0, on
the same float32 model; where a reference would leave masks in its output or never end, the rules of this
library hold instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_kernels.ops.token_stats import TokenStats
from dllm_kernels.rule import Rule

if TYPE_CHECKING:
    from dllm_kernels.sampling.step import Frame


@dataclass(frozen=True)
class Parity:
    """The ways in which a reference differs.

    fixed: the options that a mode settles; passing a different value raises ValueError. usual: those that it
    has where nothing else is said.
    precision: of the softmax behind confidences. mask_in_softmax: the mask token is barred from the argmax
    only. blocks_from_prompt: block-causal blocks count from the end of each row's prompt, whose first block
    is then short, as left padding to whole blocks has it; the last block ends with the canvas.
    shift_in_window: with a cache, the first position that a step computes is predicted by its own output.
    factor_takes_all: if only the last rank fails the factor rule, it is accepted too.
    threshold_within_quota: without a cache a threshold accepts at most what the schedule has due by then, an
    even one in place of "dream". refresh_commits_start: a refresh commits exactly the block's first position.
    every_block_counts: `steps` are spread over all blocks of the longest canvas, those without masks too.
    ranked_by_topk: where canvases are padded that torch.topk ranks, whose order among equals is its own.
    padding_seen: shorter rows are filled up with end tokens that are attended to. empty_prompts: they are
    completed like others.
    """

    fixed: Mapping[str, object] = field(default_factory=dict)
    usual: Mapping[str, object] = field(default_factory=dict)
    precision: str = "float32"
    mask_in_softmax: bool = True
    blocks_from_prompt: bool = False
    shift_in_window: bool = False
    factor_takes_all: bool = False
    threshold_within_quota: bool = False
    refresh_commits_start: bool = False
    every_block_counts: bool = False
    ranked_by_topk: str | None = None
    padding_seen: bool = False
    empty_prompts: bool = False

    # ---- canvases and blocks
    def block_borders(self, given: Tensor, stop: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return where block-causal blocks count from and where the canvases end; all int64 [B]."""
        if self.blocks_from_prompt:
            return given % size, stop.clone()
        return torch.zeros_like(given), -(-stop // size) * size

    def padded(self, end: Tensor) -> Tensor:
        """Return the ends of canvases, int64 [B], with what is attended to behind them."""
        return end.amax().expand_as(end) if self.padding_seen else end

    def shareable(self, given: Tensor, size: int, shift: bool) -> Tensor:
        """Return int64 [B], leading tokens of each prompt whose keys and values depend on nothing after them:
        whole blocks. With a shift the last block is computed, whose last output is needed."""
        if self.blocks_from_prompt:
            return torch.zeros_like(given)
        return (given // size - int(shift)).clamp(min=0) * size

    def blocks_counted(self, with_masks: int, longest: int, size: int) -> int:
        """Return the blocks that a row's steps are spread over. longest: tokens of the longest completion."""
        return -(-longest // size) if self.every_block_counts else with_masks

    def tokens_before_schedule(self, approximate: bool) -> int:
        """Return how many tokens of a block are committed before its schedule begins."""
        return int(approximate and self.refresh_commits_start)

    # ---- predictions
    def softmax_options(self, mask_id: int, suppressed: tuple[int, ...]) -> dict:
        """Return the options of `token_stats` that say which tokens are in the softmax, and its precision."""
        options = dict(precision=self.precision)
        if self.mask_in_softmax:
            return options | dict(suppress_tokens=suppressed, proposal_exclude=(mask_id,))
        return options | dict(suppress_tokens=(mask_id, *suppressed))

    def source(self, position: Tensor, first: Tensor) -> Tensor:
        """Return whose output predicts each position with a shift; first: the first that is computed."""
        source = (position - 1).clamp(min=0)
        return torch.maximum(source, first) if self.shift_in_window else source

    # ---- commits
    def candidates(self, frame: Frame, masked: Tensor, exact: bool) -> Tensor:
        """Return bool [B, C], which of the masked positions a step may fill; exact: of the cache."""
        if exact or not self.refresh_commits_start:
            return masked
        stale = torch.tensor(frame.stale, device=masked.device)[:, None]
        return masked & (~stale | (frame.window == frame.start[:, None]))

    def needs_quota(self, rule: Rule, exact: bool) -> bool:
        """Return whether each step must say how many tokens it commits."""
        return rule.needs_quota or self._within_quota(rule, exact)

    def commit_(
        self,
        accept: Callable[[Tensor, Rule, Tensor | int | None], Tensor],
        frame: Frame,
        listed: Tensor,
        stats: TokenStats,
        rule: Rule,
        exact: bool,
        ends: Tensor,
        width: int,
    ) -> Tensor:
        """Commit what the rule accepts of `listed`; return accepted, bool [B, C].

        accept: commits what a rule with a quota accepts of listed candidates. ends: int64 [rows], of all
        canvases, whose width this is.
        """
        within, quota = self._within_quota(rule, exact), self._quota(frame, listed, rule, exact)
        if self.ranks_by_topk(rule, within):
            listed = self._taken_by_topk(frame, listed, stats, rule, quota, ends[frame.rows], width)
        accepted = accept(listed, rule, None if within else quota)
        if self.factor_takes_all and rule.name == "factor":
            left = listed & ~accepted
            left &= left.sum(1, keepdim=True) == 1
            accepted |= accept(left, Rule.quota(), 1)
        return accepted

    def ranks_by_topk(self, rule: Rule, within_quota: bool = False) -> bool:
        """Return whether torch.topk says which positions a quota takes."""
        drawn = rule.alg_temp > 0 or rule.confidence == "random"
        return self.ranked_by_topk is not None and not drawn and (rule.name == "quota" or within_quota)

    def _within_quota(self, rule: Rule, exact: bool) -> bool:
        return self.threshold_within_quota and exact and rule.name == "threshold"

    def _quota(self, frame: Frame, listed: Tensor, rule: Rule, exact: bool) -> Tensor | None:
        """Return int32 [B], how many tokens each row commits; None for rules without a quota."""
        if not self.needs_quota(rule, exact):
            return None
        quotas = [row.next_quota(listed.shape[1]) for row in frame.live]
        if self._within_quota(rule, exact):
            masks = listed.sum(1).tolist()
            quotas = [count - sum(row.quotas) for count, row in zip(masks, frame.live, strict=True)]
        return torch.tensor(quotas, dtype=torch.int32, device=listed.device)

    def _taken_by_topk(
        self,
        frame: Frame,
        listed: Tensor,
        stats: TokenStats,
        rule: Rule,
        quota: Tensor,
        end: Tensor,
        width: int,
    ) -> Tensor:
        """Return bool [B, C]: what torch.topk takes of `listed` where it ranks all positions that were
        computed, in canvases padded to one width. Its order among equals follows from where they stand."""
        packing = frame.view.packing
        first = packing.first[: len(listed)]
        last = first + packing.length[: len(listed)]
        pad = width - end if self.ranked_by_topk == "left" else torch.zeros_like(end)
        low = torch.where(first > 0, first + pad, 0).tolist()
        high = torch.where(last < end, last + pad, width).tolist()
        confidence = confidence_of(stats, rule).view_as(listed).masked_fill(~listed, -torch.inf)
        column = frame.window + pad[:, None]
        ranked = confidence.new_full((len(listed), width + listed.shape[1]), -torch.inf)
        ranked = ranked.scatter_(1, column, confidence).cpu()
        taken = torch.zeros_like(ranked, dtype=torch.bool)
        for row, most in enumerate(quota.tolist()):
            some = ranked[row, low[row] : high[row]]
            taken[row, low[row] + some.topk(min(most, len(some))).indices] = True
        return listed & taken.to(listed.device).gather(1, column)


def confidence_of(stats: TokenStats, rule: Rule) -> Tensor:
    """Return what a rule that draws nothing ranks candidates by, float32 [N]."""
    return {"prob": stats.prob, "margin": stats.margin, "entropy": -stats.entropy}[rule.confidence]


NONE = Parity(mask_in_softmax=False)
_NO_STOP = dict(stop_on_eos=False)

PARITY = {
    "llada": Parity(dict(schedule="llada", cache="none", **_NO_STOP), ranked_by_topk="left"),
    "llada_fp64": Parity(
        dict(schedule="llada", cache="none", **_NO_STOP), precision="float64", ranked_by_topk="left"
    ),
    "fast_dllm": Parity(dict(schedule="llada", **_NO_STOP), precision="float64", factor_takes_all=True),
    "fast_dllm_dream": Parity(
        _NO_STOP,
        dict(schedule="dream"),
        shift_in_window=True,
        threshold_within_quota=True,
        refresh_commits_start=True,
        ranked_by_topk="left",
    ),
    "dllm_mdlm": Parity(
        _NO_STOP,
        dict(schedule="dllm"),
        shift_in_window=True,
        every_block_counts=True,
        ranked_by_topk="right",
        empty_prompts=True,
    ),
    "dllm_dream": Parity(_NO_STOP, dict(schedule="dllm"), ranked_by_topk="left", empty_prompts=True),
    "dllm_bd3lm": Parity(_NO_STOP, dict(schedule="dllm"), blocks_from_prompt=True, empty_prompts=True),
    "dllm_fast_dllm": Parity(
        _NO_STOP,
        dict(schedule="dllm"),
        shift_in_window=True,
        every_block_counts=True,
        padding_seen=True,
        empty_prompts=True,
    ),
    "dllm_fast_dllm_dream": Parity(
        _NO_STOP,
        shift_in_window=True,
        threshold_within_quota=True,
        refresh_commits_start=True,
        ranked_by_topk="left",
        empty_prompts=True,
    ),
    "dream": Parity(dict(schedule="dream", cache="none", **_NO_STOP), ranked_by_topk="left"),
    "llada2": Parity(dict(rule="quota_or_threshold")),
}
