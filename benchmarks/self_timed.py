"""Alternatives that measure themselves: programs of other projects that print their time per step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class SelfTimed:
    """A function that returns the seconds that one step of it took, to stand among the baselines."""

    seconds: Callable[..., float]

    def __call__(self, *inputs) -> float:
        return self.seconds(*inputs)
