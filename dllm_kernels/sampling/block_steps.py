"""The steps of each row's active block: what is next, and when the block is over. Kept on the host."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


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
