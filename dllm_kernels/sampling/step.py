"""One step of the rows in flight, for every loop: candidates -> output rows -> statistics -> commits.

    candidates  int [B, C]: the positions of each row's active block that the step may fill
    Predictions their output rows, of one forward over a view (shift, guidance)
    Statistics  token and confidence of each
    accept_     what the rule takes is written into the canvas (csrc/core/acceptance.h)

`Frame`, `LiveRow` and `Acceptance` are what the host knows of rows that it moves itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels.ops.token_stats import CHUNK_LOGITS, TokenStats, token_stats
from dllm_kernels.ops.unmask import commit_
from dllm_kernels.rule import Rule
from dllm_kernels.sampling.canvas_control import AllowedTokens
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.plan import Plan
from dllm_kernels.sampling.views import DeviceView, StepView

# ---- output rows of candidates ----------------------------------------------------------------------------


class Predictions:
    """Output rows that predict candidates, and what they need from one step to the next.

    before: [slots, H], with a cache and a shift the output row at start − 1 of each row's active block: it
    predicts position `start`, and later steps of the block do not compute it. None until a forward has shown
    what an output row is.
    """

    def __init__(self, plan: Plan, slots: int):
        self.plan, self.slots = plan, slots
        self.before: Tensor | None = None

    def of(
        self,
        canvas: Tensor,
        hidden: Tensor | None,
        view: StepView | DeviceView,
        first: Tensor,
        start: Tensor,
        candidates: Tensor,
        slots: Tensor | slice,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Return output rows [B·C, H], or [M, H] of the M `wanted` ones, and the forwards made.

        canvas: int64 [B, T]. hidden: bool [B, T], what guidance hides from its second stream, whose rows
        stand behind the others in `view`. first, start: [B], the first position that is computed, and the
        first one of the active block. candidates: [B, C], positions. slots: where each row's own entry of
        `before` is. wanted: int64 [M], indices among the B·C candidates.
        """
        plan, count = self.plan, len(candidates)
        every = torch.arange(count, device=candidates.device)
        row, position = every[:, None].expand_as(candidates).flatten(), candidates.flatten().long()
        if wanted is not None:
            row, position = row[wanted], position[wanted]

        # With a shift a prediction comes from the output before it; that of a block's first position too,
        # which is computed for as long as what stands before the block is.
        source_row, source = row, position
        if plan.shift:
            source = plan.parity.source(position, first[row])
        edges = plan.shift and view.cached
        if edges:
            source_row, source = torch.cat([row, every]), torch.cat([source, start - 1])
        column = source - first[source_row]
        places = view.place(source_row, column)

        # Guidance: (1 + s)·conditional − s·unconditional.
        if plan.streams == 2:
            canvas = torch.cat([canvas, canvas.masked_fill(hidden, plan.mask_id)])
            places = torch.cat([places, view.place(source_row + count, column)])
        output, forwards = plan.runner.outputs(view.tokens_of(canvas), view, places)
        if plan.streams == 2:
            conditional, unconditional = output.chunk(2)
            output = torch.lerp(unconditional, conditional, 1 + plan.config.cfg_scale)
        if not edges:
            return output, forwards

        output, edge = output[: len(row)], output[len(row) :]
        if self.before is None:
            self.before = output.new_zeros(self.slots, output.shape[1])
        # Of forwards over what stands before a block, the last one reaches its edge.
        before = torch.where((first < start)[:, None], edge, self.before[slots])
        self.before[slots] = before
        return torch.where((column[: len(row)] < 0)[:, None], before[row], output), forwards


# ---- statistics of output rows ----------------------------------------------------------------------------


class Logprobs(NamedTuple):
    """Log-probabilities of N tokens, float32 [N]; the k likeliest tokens in their places, int64 [N, k], and
    theirs, float32 [N, k]."""

    chosen: Tensor
    top_tokens: Tensor
    top: Tensor

    @staticmethod
    def of_nothing(ids: Tensor, count: int) -> Logprobs:
        """Return records for canvases like `ids` [B, T] where nothing is committed yet: 0, and tokens -1."""
        top = ids.new_full((*ids.shape, count), -1)
        return Logprobs(
            torch.zeros_like(ids, dtype=torch.float32), top, torch.zeros_like(top, dtype=torch.float32)
        )


class Statistics:
    """The statistics that one call asks of output rows.

    Logits are stored, in chunks of rows, only for filters, for rules that compare with the step before, and
    where some tokens are allowed alone.

    last: [slots · width, V], the logits of the step before; width is the most positions that a block has.
    """

    def __init__(self, plan: Plan, rule: Rule, slots: int, width: int, allowed: AllowedTokens | None = None):
        config = plan.config
        self.plan, self.slots, self.width, self.allowed = plan, slots, width, allowed
        self.options = dict(
            temperature=config.temperature, seed=config.seed,
            confidence_exclude=config.begin_suppress_tokens,
            **plan.parity.softmax_options(plan.mask_id, config.suppress_tokens),
        )  # fmt: skip
        self.filters = {}
        if config.top_p is not None or config.top_k is not None:
            temperature = config.temperature if config.temperature > 0 else 1.0
            self.filters = dict(top_p=config.top_p, top_k=config.top_k, confidence_temperature=temperature)
        self.remembers = rule.needs_state
        self.last: Tensor | None = None

    def begin_block(self, slot: int) -> None:
        """Forget the logits of the row in `slot`: the first step of a block has none before it."""
        if self.last is not None:
            self.last.view(self.slots, -1, self.last.shape[-1])[slot] = -torch.inf

    def of(
        self,
        output: Tensor,
        noise_ids: Tensor | None,
        place: Tensor | None = None,
        at: tuple[Tensor, Tensor] | None = None,
    ) -> TokenStats:
        """Return those of output rows [N, H].

        noise_ids: int32 [N, 3]. place: int64 [N], where their logits of the step before lie in `last`, for
        rules that compare. at: int64 [N] twice, canvas and position, where some tokens are allowed alone.
        """
        if not (self.filters or self.remembers or self.allowed):
            return self.plan.runner.statistics(output, noise_ids=noise_ids, **self.options)
        chunks, options = [], self.options | self.filters
        for some, logits in self._logits(output, at):
            before = self._last(logits, place[some]) if self.remembers else None
            noise = None if noise_ids is None else noise_ids[some]
            chunks.append(token_stats(logits, previous=before, noise_ids=noise, **options))
        return TokenStats(
            *(None if field[0] is None else torch.cat(field) for field in zip(*chunks, strict=True))
        )

    def log_probabilities(
        self, output: Tensor, tokens: Tensor, count: int = 0, at: tuple[Tensor, Tensor] | None = None
    ) -> Logprobs:
        """Return those of `tokens`, int64 [N], and of the `count` likeliest tokens, from output rows [N, H].

        They are those of softmax(logits) over the tokens that may be proposed, before any filter.
        """
        barred = [self.plan.mask_id, *self.plan.config.suppress_tokens]
        chunks = []
        for some, logits in self._logits(output, at):
            logits = logits.float().index_fill(1, torch.tensor(barred, device=logits.device), -torch.inf)
            every = logits.log_softmax(-1)
            top = every.topk(min(count, every.shape[1]), dim=-1)
            chunks.append((every.gather(1, tokens[some, None])[:, 0], top.indices, top.values))
        return Logprobs(*map(torch.cat, zip(*chunks, strict=True)))

    def _logits(self, output: Tensor, at: tuple[Tensor, Tensor] | None) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the N output rows and their logits [n, V], -inf for tokens not allowed there."""
        size = max(1, CHUNK_LOGITS // (self.plan.diffusion.vocab_size or 1 << 16))
        for first in range(0, max(len(output), 1), size):
            some = slice(first, first + size)
            logits = self.plan.runner.logits(output[some])
            if self.allowed is not None:
                logits = self.allowed.bar(logits, *(index[some] for index in at))
            yield some, logits

    def _last(self, logits: Tensor, place: Tensor) -> Tensor:
        """Return the logits of the step before, in whose place these are put."""
        if self.last is None:
            self.last = logits.new_full((self.slots * self.width, logits.shape[1]), -torch.inf)
        before = self.last[place]
        self.last[place] = logits
        return before


# ---- commits ----------------------------------------------------------------------------------------------


def noise_ids(plan: Plan, numbers: Tensor, candidates: Tensor, step: Tensor) -> Tensor | None:
    """Return int32 [B·C, 3], what the noise of each candidate is keyed by; None at temperature 0.

    numbers, step: [B], what noise knows the rows by, and their steps so far. candidates: [B, C].
    """
    if not plan.config.temperature > 0:
        return None
    fields = torch.broadcast_tensors(numbers[:, None], candidates, step[:, None])
    return torch.stack(fields, dim=-1).flatten(0, 1).int()


def accept_(
    plan: Plan,
    rule: Rule,
    canvas: Tensor,
    candidates: Tensor,
    stats: TokenStats,
    *,
    step: Tensor,
    numbers: Tensor,
    quota: Tensor | int | None = None,
    state: Tensor | None = None,
) -> Tensor:
    """Write what `rule` accepts into canvas [B, T]; return accepted, bool [B, C].

    candidates: int32 [B, C], -1 for none; the rest as of `commit_`, step and numbers int32 [B].
    """
    return commit_(
        canvas, candidates, stats, rule, mask_id=plan.mask_id, quota=quota, state=state, step=step,
        sequence_ids=numbers, seed=plan.config.seed,
    )  # fmt: skip


def block_flags(masks: Tensor, wanted: Tensor, ends: Tensor) -> Tensor:
    """Return int64 [B, 2] of rows after a commit: how many masks are left to fill in the block, and whether
    an end token stands before all of its masks.

    masks: bool [B, C], in the block as it now is; wanted: bool, which of them are to be filled; ends: bool,
    the end tokens of the completion.
    """
    return torch.stack([(masks & wanted).sum(1), (ends & (masks.cumsum(1) == 0)).any(1)], dim=1)


# ---- rows that the host moves -----------------------------------------------------------------------------


@dataclass(eq=False)
class LiveRow:
    """A row in a slot, and where it stands.

    row: its index in the call; step: forwards it took part in. Its active block is [start, end); reach: end
    of what is computed and seen at all. Of the block, masks: how many were left when last looked at; quotas:
    what is left of its schedule; taken: forwards so far; index: the step in the rule's own time, which passes
    over steps that draw nothing; post: steps without masks, which only edit.
    """

    row: int
    step: int = 0
    start: int = 0
    end: int = 0
    reach: int = 0
    masks: int = 0
    quotas: deque[int] = field(default_factory=deque)
    taken: int = 0
    index: int = 0
    post: int = 0

    def begin(self, start: int, end: int, reach: int, masks: int, quotas: Sequence[int]) -> None:
        """Move to the block [start, end)."""
        self.start, self.end, self.reach, self.masks, self.quotas = start, end, reach, masks, deque(quotas)
        self.taken = self.index = self.post = 0

    def stale(self, refresh_every: int | None) -> bool:
        """Return whether the next forward renews an approximate cache."""
        return self.taken == 0 or (refresh_every is not None and self.taken % refresh_every == 0)

    def next_quota(self, everything: int) -> int:
        """Return the next of the schedule; behind its end (where masks came back) everything."""
        return self.quotas.popleft() if self.quotas else everything

    def went_on(self) -> None:
        """Count one more forward."""
        self.step, self.taken, self.index = self.step + 1, self.taken + 1, self.index + 1

    def is_edited(self, had_masks: bool, changed: bool, most: int) -> bool:
        """Return whether a block without masks is done with editing: a step without masks changed nothing,
        or there were enough of them."""
        self.post += not had_masks
        return self.post >= most or not (had_masks or changed)


@dataclass(frozen=True)
class Frame:
    """Live rows at their active blocks, B of them.

    stale: which renew an approximate cache; slots, rows, numbers: int64 [B], where they are, their indices in
    the call, what noise knows them by; given, stop: int64 [B], where their completions begin and end; start:
    int64 [B], where their blocks begin; window: int64 [B, C], the blocks' positions, longer than some;
    inside: bool, which are; index: window kept inside the canvas; view: of the next forward.
    """

    live: list[LiveRow]
    stale: list[bool]
    slots: Tensor
    rows: Tensor
    numbers: Tensor
    given: Tensor
    stop: Tensor
    start: Tensor
    window: Tensor
    inside: Tensor
    index: Tensor
    view: StepView

    def positions(self, listed: Tensor) -> Tensor:
        """Return int32 [B, C], those of `listed`, else -1."""
        return self.window.masked_fill(~listed, -1).int()


class Acceptance:
    """The rule of one call, for rows that the host moves.

    blank: bool [B, T], what was masked at first, all else is prompt. ends: int64 [B], the canvases' lengths.
    state: int32 [B, T], counters of a rule that needs them.
    """

    def __init__(self, plan: Plan, rule: Rule, blank: Tensor, ends: Tensor):
        self.plan, self.rule, self.blank, self.ends = plan, rule, blank, ends
        self.state = torch.zeros_like(blank, dtype=torch.int32) if rule.needs_state else None

    def candidates(self, frame: Frame, canvas: Tensor, masked: Tensor) -> Tensor:
        """Return bool [B, C], the positions whose statistics the rule needs; masked: those with a mask."""
        if self.rule.name == "edit":
            return frame.inside & self.blank[frame.rows].gather(1, frame.index)
        if self.rule.name == "bernoulli":
            return self._drawn(frame, canvas, masked)
        return self.plan.parity.candidates(frame, masked, self.plan.scheme.exact)

    def commit_(
        self, frame: Frame, canvas: Tensor, listed: Tensor, stats: TokenStats, step: Tensor
    ) -> Tensor:
        """Write what the rule accepts of `listed` into canvas [B, T]; return accepted, bool [B, C].

        stats: of all B·C positions. step: int64 [B], forwards that the rows took part in.
        """
        common = dict(
            numbers=frame.numbers.int(),
            step=self._index(frame, step.device) if self.rule.name == "bernoulli" else step.int(),
        )
        state = None if self.state is None else self.state[frame.rows]

        def accept(listed: Tensor, rule: Rule, quota: Tensor | int | None) -> Tensor:
            places = frame.positions(listed)
            return accept_(self.plan, rule, canvas, places, stats, quota=quota, state=state, **common)

        accepted = self.plan.parity.commit_(
            accept, frame, listed, stats, self.rule, self.plan.scheme.exact, self.ends, self.blank.shape[1]
        )
        if state is not None:
            self.state[frame.rows] = state
        return accepted

    def _index(self, frame: Frame, device: torch.device) -> Tensor:
        return torch.tensor([row.index for row in frame.live], dtype=torch.int32, device=device)

    def _drawn(self, frame: Frame, canvas: Tensor, masked: Tensor) -> Tensor:
        """Return bool [B, C]: what rule `bernoulli` draws of the masks in each row's next step.

        The draw depends on no statistics, so that it is known beforehand, and a step that draws nothing is
        passed over without a forward. Every row draws something in its last step.
        """
        zeros = torch.zeros(masked.numel(), dtype=torch.float32, device=masked.device)
        anything = TokenStats(
            torch.full_like(zeros, int(self.plan.mask_id == 0), dtype=torch.int64), *[zeros] * 4
        )
        while True:
            found = accept_(
                self.plan, self.rule, canvas.clone(), frame.positions(masked), anything,
                step=self._index(frame, masked.device), numbers=frame.numbers.int(),
            )  # fmt: skip
            idle = (~found.any(1)).tolist()
            if not any(idle):
                return found
            for row, nothing in zip(frame.live, idle, strict=True):
                row.index += nothing


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
