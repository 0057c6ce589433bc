"""Likelihoods as LLaDA's evaluation computes them: one request at a time, its samples as one batch.

Every forward gives all logits of all rows, of which the masked targets are taken. A block-causal model gets a
batch for each block of the target: the clean tokens before the block and the noised block.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_train.evaluate.masks import masked_counts, masked_targets


@torch.no_grad()
def one_request_at_a_time(
    model, requests: list[tuple[list[int], list[int]]], *, mask_id: int, samples: int, block_size: int | None
) -> Tensor:
    """Return the bound of log p(target | context) of each request, float64 [n], from the masks of seed 0.

    block_size: of a block-causal model; None: all targets are masked together.
    """
    return torch.tensor(
        [
            sum(
                _segment(
                    model, ids[: places[-1] + 1], len(places), mask_id, samples, index, places[0] - given
                )
                for places in _segments(given, len(ids), block_size)
            )
            for index, (ids, given) in enumerate(
                (torch.tensor([*context, *target]), len(context)) for context, target in requests
            )
        ],
        dtype=torch.float64,
    )


def _segments(given: int, end: int, block_size: int | None) -> list[list[int]]:
    places = range(given, end)
    if block_size is None:
        return [list(places)]
    return [list(block) for _, block in itertools.groupby(places, lambda place: place // block_size)]


def _segment(model, ids: Tensor, length: int, mask_id: int, samples: int, request: int, place: int) -> float:
    """Return the mean over samples of length / k times the sum of log p of the last `length` ids."""
    key = dict(seed=0, request_id=request, place=place)
    counts = masked_counts(length, samples, **key)
    rows = ids.repeat(samples, 1)
    rows[:, -length:][torch.from_numpy(masked_targets(counts, length, **key))] = mask_id
    logits = model(rows).logits
    masked = rows == mask_id
    ce = F.cross_entropy(logits[masked], ids.expand_as(rows)[masked], reduction="none")
    weights = (length / torch.from_numpy(counts))[:, None].expand_as(rows)[masked]
    return -float((ce * weights).sum()) / samples
