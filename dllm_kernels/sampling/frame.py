"""What stays the same from round to round until a row moves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dllm_kernels.sampling.views import StepView


@dataclass(frozen=True)
class Frame:
    """The live rows at their active blocks.

    live, rows: int64 [B], the live rows; stale: which renew an approximate cache; start: int64 [B], where
    their active blocks begin; window: int64 [B, C], their positions, longer than some; inside: bool, which
    are; index: window kept inside the canvas; view: of the next forward.
    """

    live: list[int]
    stale: list[bool]
    rows: Tensor
    start: Tensor
    window: Tensor
    inside: Tensor
    index: Tensor
    view: StepView

    def positions(self, listed: Tensor) -> Tensor:
        """int32 [B, C], those of `listed`, else -1."""
        return self.window.masked_fill(~listed, -1).int()
