"""One step of the live rows: which positions are candidates, what the model says of them, what is committed.

1. Frame: the live rows at their active blocks.
2. Acceptance.candidates: the positions whose statistics the rule needs.
3. Predictions: which output rows they are (shift, guidance), and Statistics of those.
4. Acceptance.commit_: what the rule accepts, written into the canvas.
What a rule accepts is in csrc/core/acceptance.h.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm_kernels.ops.token_stats import CHUNK_LOGITS, TokenStats, token_stats
from dllm_kernels.ops.unmask import commit_
from dllm_kernels.rule import Rule
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.plan import Plan
from dllm_kernels.sampling.views import StepView


@dataclass
class BlockSteps:
    """One row in its active block.

    quotas: what is left of the schedule. taken: forwards so far. index: the step in the rule's own time,
    which passes over steps that draw nothing. post: steps without masks, which only edit.
    """

    quotas: deque[int] = field(default_factory=deque)
    taken: int = 0
    index: int = 0
    post: int = 0

    def stale(self, refresh_every: int | None) -> bool:
        """Whether the next forward renews an approximate cache."""
        return self.taken == 0 or (refresh_every is not None and self.taken % refresh_every == 0)

    def next_quota(self, everything: int) -> int:
        """The next of the schedule; behind its end (where `on_round` put masks back) everything."""
        return self.quotas.popleft() if self.quotas else everything

    def is_edited(self, had_masks: bool, changed: bool, most: int) -> bool:
        """Whether a block without masks is done with editing: a step without masks changed nothing, or
        there were enough of them."""
        self.post += not had_masks
        return self.post >= most or not (had_masks or changed)


# ---- frame ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """The live rows at their active blocks.

    live, rows: int64 [B], the live rows; stale: which renew an approximate cache; numbers: int64 [B], what
    noise knows them by; start: int64 [B], where their active blocks begin; window: int64 [B, C], their
    positions, longer than some; inside: bool, which are; index: window kept inside the canvas; view: of the
    next forward.
    """

    live: list[int]
    stale: list[bool]
    rows: Tensor
    numbers: Tensor
    start: Tensor
    window: Tensor
    inside: Tensor
    index: Tensor
    view: StepView

    def positions(self, listed: Tensor) -> Tensor:
        """int32 [B, C], those of `listed`, else -1."""
        return self.window.masked_fill(~listed, -1).int()


# ---- statistics of output rows ----------------------------------------------------------------------------


class Statistics:
    """What one call asks of an output row. The logits are stored, in chunks of rows, only for filters and for
    rules that compare with the step before.

    last: [slots · width, V], the logits of the step before; width is the most positions that a block has.
    """

    def __init__(self, plan: Plan, rule: Rule, slots: int, width: int):
        config = plan.config
        self.plan, self.slots, self.width = plan, slots, width
        self.options = dict(
            temperature=config.temperature, seed=config.seed, precision=plan.parity.precision,
            confidence_exclude=config.begin_suppress_tokens,
        )  # fmt: skip
        barred = (plan.mask_id, *config.suppress_tokens)
        if plan.parity.mask_in_softmax:
            self.options |= dict(suppress_tokens=config.suppress_tokens, proposal_exclude=(plan.mask_id,))
        else:
            self.options |= dict(suppress_tokens=barred)
        self.filters = {}
        if config.top_p is not None or config.top_k is not None:
            temperature = config.temperature if config.temperature > 0 else 1.0
            self.filters = dict(top_p=config.top_p, top_k=config.top_k, confidence_temperature=temperature)
        self.remembers = rule.needs_state
        self.last: Tensor | None = None

    def begin_block(self, slot: int) -> None:
        """A row in `slot` starts a block, whose first step has none before it."""
        if self.last is not None:
            self.last.view(self.slots, -1, self.last.shape[-1])[slot] = -torch.inf

    def of(self, output: Tensor, noise_ids: Tensor | None, place: Tensor | None = None) -> TokenStats:
        """Of output rows [N, H]. noise_ids: int32 [N, 3]. place: int64 [N], where their logits of the step
        before lie in `last`, for rules that compare."""
        runner = self.plan.runner
        if not (self.filters or self.remembers):
            return runner.statistics(output, noise_ids=noise_ids, **self.options)
        size = max(1, CHUNK_LOGITS // (self.plan.diffusion.vocab_size or 1 << 16))
        chunks, options = [], self.options | self.filters
        for first in range(0, max(len(output), 1), size):
            some = slice(first, first + size)
            logits = runner.logits(output[some])
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


# ---- predictions of candidates ----------------------------------------------------------------------------
# What the model predicts for each candidate: guidance and shift.
#
# One forward over a view gives output rows; this section says which rows a candidate needs, `Statistics` how
# they become its statistics.


class Predictions:
    """Statistics of candidates, and what they need from one step to the next.

    before: [rows, H], with a cache and a shift the output row at start − 1 of each row's active block: it
    predicts position `start`, and later steps of the block do not compute it. width: the most positions that
    a block has.
    """

    def __init__(self, plan: Plan, rule: Rule, rows: int, slots: int, width: int):
        self.plan, self.rows, self.width = plan, rows, width
        self.statistics = Statistics(plan, rule, slots, width)
        self.before: Tensor | None = None

    def begin_block(self, slot: int) -> None:
        """A row in `slot` starts a block."""
        self.statistics.begin_block(slot)

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
        int64 [M] each. noise_ids: int32 [M, 3]. slot: int64 [B], of each row.
        """
        row, position = candidate
        first = view.packing.first[: len(rows)]
        source = position
        if self.plan.shift:
            source = (position - 1).clamp(min=0)
            if self.plan.parity.shift_in_window:
                source = torch.maximum(source, first[row])
        kept = source < first[row]  # start − 1, computed by an earlier forward of this block
        edge = row.new_zeros(0)
        if self.plan.shift and view.pages is not None:
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
        return self.statistics.of(output, noise_ids, place), forwards

    def _outputs(self, canvas, view, row, position, count) -> tuple[Tensor, int]:
        """Output rows of these positions; with guidance (1 + s)·conditional − s·unconditional."""
        packing, scale = view.packing, self.plan.config.cfg_scale
        ids, places = canvas[packing.row, packing.position][None], packing.place(row, position)
        if not scale:
            return self.plan.runner.outputs(ids, view, places)
        places = torch.cat([places, packing.place(row + count, position)])
        output, forwards = self.plan.runner.outputs(ids, view, places)
        conditional, unconditional = output.chunk(2)
        return torch.lerp(unconditional, conditional, 1 + scale), forwards


# ---- candidates and commits -------------------------------------------------------------------------------


class Acceptance:
    """The rule of one call.

    blank: bool [B, T], what was masked at first, all else is prompt. ends: int64 [B], the canvases' lengths.
    state: int32 [B, T], counters of a rule that needs them.
    """

    def __init__(self, plan: Plan, rule: Rule, blank: Tensor, ends: Tensor):
        self.plan, self.rule, self.blank, self.ends = plan, rule, blank, ends
        self.state = torch.zeros_like(blank, dtype=torch.int32) if rule.needs_state else None
        parity = plan.parity
        self.start_alone = parity.refresh_commits_start and not plan.scheme.exact
        self.within_quota = parity.threshold_within_quota and plan.scheme.exact and rule.name == "threshold"
        self.needs_quota = rule.needs_quota or self.within_quota
        drawn = rule.alg_temp > 0 or rule.confidence == "random"
        ranked = parity.ranked_by_topk is not None and (rule.name == "quota" or self.within_quota)
        self.by_topk = ranked and not drawn

    def candidates(self, frame: Frame, blocks: list[BlockSteps], canvas: Tensor, masked: Tensor) -> Tensor:
        """bool [B, C], the positions whose statistics the rule needs; masked: those that hold a mask."""
        if self.rule.name == "edit":
            return frame.inside & self.blank[frame.rows].gather(1, frame.index)
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
            mask_id=self.plan.mask_id, seed=self.plan.config.seed, sequence_ids=frame.numbers.int(),
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
        if self.plan.parity.factor_takes_all and self.rule.name == "factor":
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
        packing, width = frame.view.packing, self.blank.shape[1]
        first, end = packing.first[: len(listed)], self.ends[frame.rows]
        last = first + packing.length[: len(listed)]
        pad = width - end if self.plan.parity.ranked_by_topk == "left" else torch.zeros_like(end)
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
            torch.full_like(zeros, int(self.plan.mask_id == 0), dtype=torch.int64), *[zeros] * 4
        )
        while True:
            found = commit_(
                canvas.clone(), frame.positions(masked), anything, self.rule, mask_id=self.plan.mask_id,
                step=self._index(blocks, masked.device), sequence_ids=frame.numbers.int(),
                seed=self.plan.config.seed,
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
