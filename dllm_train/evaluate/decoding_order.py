"""Reveal the targets of requests one by one in the order of the sampler, most confident first.

At each step the sampler would commit its most confident proposal. Here the target takes that place instead:
its log p is summed up [confidence order, iLLaDA], and decoding is greedy while proposals and targets agree.
The blocks of a block-causal model are revealed side by side, each beside the clean targets before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dllm_train.evaluate.noised_rows import RowScorer
from dllm_train.evaluate.segments import Segment


def reveal(
    scorer: RowScorer, segments: Sequence[Segment], mask_id: int, *, only_greedy: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of log p of each segment's targets, float64, and whether all were the proposals, bool.

    only_greedy: leave a request at its first target that is not proposed; its sum then means nothing.
    """
    hidden = [np.ones(len(segment.targets), dtype=bool) for segment in segments]
    total, greedy = np.zeros(len(segments)), np.ones(len(segments), dtype=bool)
    live = list(range(len(segments)))
    while live:
        rows = [segments[index].rows(hidden[index][None], hidden[index][None], mask_id)[0] for index in live]
        log_p, proposals, confidences = scorer.proposals(rows, mask_id)
        offset = 0
        for index in live:
            places = np.flatnonzero(hidden[index])
            best = int(confidences[offset : offset + len(places)].argmax())
            total[index] += log_p[offset + best]
            greedy[index] &= proposals[offset + best] == segments[index].targets[places[best]]
            hidden[index][places[best]] = False
            offset += len(places)
        failed = {id(segments[index].request) for index in np.flatnonzero(~greedy)} if only_greedy else ()
        live = [index for index in live if hidden[index].any() and id(segments[index].request) not in failed]
    return total, greedy
