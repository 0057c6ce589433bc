"""What stands of a completion that was stopped."""

from __future__ import annotations


class Partial:
    """Follows row 0 of a run, as `on_round`. start: where its completion begins; None: at the first mask."""

    def __init__(self, tokenizer, mask_id: int, start: int | None = None):
        self.tokenizer, self.mask_id, self.start = tokenizer, mask_id, start
        self.canvas: list[int] = []

    def __call__(self, event) -> None:
        self.canvas = event.canvas[0].tolist()
        if self.start is None:
            self.start = min([*event.positions_of(0), *self._masks()], default=len(self.canvas))

    def text(self) -> str:
        """Return what stands before the first mask."""
        from dllm_kernels.models.text import added_text

        end = min(self._masks(), default=len(self.canvas))
        return added_text(self.tokenizer, self.canvas[: self.start], self.canvas[self.start : end])

    def _masks(self) -> list[int]:
        return [at for at, token in enumerate(self.canvas) if token == self.mask_id]
