"""Decoding metrics as the field counts them, from what `dk.sample` and `dk.infill` return.

Tokens are those that a completion adds to its prompt, without the end token and the tail of end tokens that
fills its canvas. Forwards are those of the denoiser, the one that computes the prompt included. Speed is that
of one request at a time, from the call to its completion. No speed says anything without an accuracy.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dllm_kernels.sampling.output import SampleOutput


@dataclass(frozen=True)
class DecodingMetrics:
    """Metrics of a number of requests.

    tokens, forwards: of all requests. tokens_per_forward: their ratio. tokens_per_second: the median over
    requests of tokens by latency; None where no latencies were given.
    """

    tokens: int
    forwards: int
    tokens_per_forward: float
    tokens_per_second: float | None = None


def decoding_metrics(
    outputs: Sequence[SampleOutput], latencies: Sequence[float] | None = None
) -> DecodingMetrics:
    """Return the metrics of several calls of `dk.sample` or `dk.infill`.

    latencies: seconds of each call from its begin to its end. Each call then has one request, since several
    at once share their time. Raises ValueError for other calls and for latencies that are not positive.
    """
    if not outputs:
        raise ValueError("outputs is empty; expected at least one output of dk.sample or dk.infill")
    tokens = [int(output.lengths.sum()) for output in outputs]
    forwards = sum(int(output.row_forwards.sum()) for output in outputs)
    rate = None
    if latencies is not None:
        rate = tokens_per_second(outputs, latencies)
    return DecodingMetrics(sum(tokens), forwards, sum(tokens) / max(forwards, 1), rate)


def tokens_per_second(outputs: Sequence[SampleOutput], latencies: Sequence[float]) -> float:
    """Return the median over calls of one request of its tokens by its latency in seconds."""
    if len(latencies) != len(outputs):
        raise ValueError(f"latencies has {len(latencies)} entries for {len(outputs)} outputs")
    for index, (output, seconds) in enumerate(zip(outputs, latencies, strict=True)):
        if len(output.lengths) != 1:
            raise ValueError(
                f"outputs[{index}] has {len(output.lengths)} rows, which share their time; give each request "
                "its own call"
            )
        if not seconds > 0:
            raise ValueError(f"latencies[{index}] is {seconds}; expected seconds above 0")
    return statistics.median(
        int(output.lengths) / seconds for output, seconds in zip(outputs, latencies, strict=True)
    )


def area_under(points: Sequence[tuple[float, float]]) -> float:
    """Return the area under the accuracy that is reached at a speed or a higher one.

    points: (speed, accuracy). The area is the integral from speed 0 to the highest one of the best accuracy
    among points at least as fast. A point that another one beats in both adds nothing.
    """
    area, fastest, best = 0.0, 0.0, 0.0
    steps = []
    for speed, accuracy in sorted(points, reverse=True):
        best = max(best, accuracy)
        steps.append((speed, best))
    for speed, accuracy in reversed(steps):
        area += (speed - fastest) * accuracy
        fastest = speed
    return area
