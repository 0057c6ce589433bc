"""The steps of each row's active block: what is next, and when the block is over. Kept on the host."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm_kernels.ops.token_stats import TokenStats
from dllm_kernels.ops.unmask import commit_
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.rules import Rule


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


def drawn(
    rule: Rule, steps: list[BlockSteps], canvas: Tensor, positions: Tensor, *, mask_id: int, rows: Tensor,
    seed: int
) -> Tensor:  # fmt: skip
    """bool [B, C]: what rule `bernoulli` draws of the masked `positions` in each row's next step.

    The draw depends on no statistics, so that it is known beforehand, and a step that draws nothing is passed
    over without a forward. Every row draws something in its last step.
    """
    count = positions.numel()
    zeros = torch.zeros(count, device=canvas.device)
    anything = TokenStats(torch.full_like(zeros, int(mask_id == 0), dtype=torch.int64), *[zeros] * 4)
    while True:
        index = torch.tensor([row.index for row in steps], dtype=torch.int32, device=canvas.device)
        found = commit_(
            canvas.clone(), positions, anything, rule, mask_id=mask_id, step=index, sequence_ids=rows.int(),
            seed=seed,
        )  # fmt: skip
        idle = (~found.any(1)).tolist()
        if not any(idle):
            return found
        for row, nothing in zip(steps, idle, strict=True):
            row.index += nothing
