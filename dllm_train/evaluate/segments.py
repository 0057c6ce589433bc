"""Requests, and the segments of targets that are denoised together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dllm_train.evaluate.noised_rows import NoisedRow


@dataclass(frozen=True, eq=False)
class Request:
    """A request as estimators see it.

    name: for errors. ids: int64 [C + L], the context and the targets after it. given: C. noise_id:
    the key of its noise. place: of its first target in the document that it is a window of.
    """

    name: str
    ids: np.ndarray
    given: int
    noise_id: int
    place: int = 0


@dataclass(frozen=True, eq=False)
class Segment:
    """L targets of a request that are denoised together.

    start, end: the positions that a row computes. first: that of the first target. clean: see `NoisedRow`.
    """

    request: Request
    start: int
    first: int
    end: int
    clean: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """Return int64 [L]."""
        return self.request.ids[self.first : self.end]

    @property
    def noise_key(self) -> dict[str, int]:
        """Return the keys of the noise besides the seed: the request, and the target where this begins."""
        place = self.request.place + self.first - self.request.given
        return {"request_id": self.request.noise_id, "place": place}

    def rows(self, masked: np.ndarray, scored: np.ndarray, mask_id: int) -> list[NoisedRow]:
        """Return a row for each of masked, bool [R, L], with its targets `scored`, bool [R, L]."""
        given = self.first - self.start
        ids = np.tile(self.request.ids[self.start : self.end], (len(masked), 1))
        ids[:, given:][masked] = mask_id
        return [
            NoisedRow(
                row, self.start, self.clean, len(self.request.ids), given + places, self.targets[places]
            )
            for row, places in zip(ids, map(np.flatnonzero, scored), strict=True)
        ]


def segments_of(request: Request, block_size: int | None) -> list[Segment]:
    """Return the segments of a request. block_size: of a block-causal model, whose blocks count from
    position 0; None: all targets are one segment."""
    end = len(request.ids)
    if block_size is None:
        return [Segment(request, 0, request.given, end, request.ids[:0])]
    starts = range(request.given // block_size * block_size, end, block_size)
    clean = request.ids[: starts[-1]]
    return [
        Segment(request, start, max(start, request.given), min(start + block_size, end), clean)
        for start in starts
    ]
