"""Draw the masks of likelihood estimates: how many tokens each sample masks, and which.

Every draw is Philox4x32-10 with key = seed and counter = (position // 4, sample, request id, place), so an
answer depends on no batch, order or rank. `place` tells the blocks and windows of one request apart.
"""

from __future__ import annotations

import numpy as np
import torch

from dllm_train.noise import philox4x32

PARITY = ("llada",)
_WHICH, _HOW_MANY = 0, 1


def masked_counts(
    length: int, samples: int, *, seed: int, request_id: int, place: int = 0, parity: str | None = None
) -> np.ndarray:
    """Return how many of `length` targets each sample masks, int64 [samples], all in 1..length.

    k_j = ((k_0 - 1 + floor(j * length / samples)) mod length) + 1 with one k_0 uniform in 1..length: each k_j
    is uniform, and together they spread evenly. parity="llada" rounds k_0 + j * length / samples to even
    instead, in float32, as LLaDA's evaluation does; then k_j is not uniform and the bound is biased.
    """
    bits = _bits(1, 1, seed, request_id, place, _HOW_MANY)[0, 0]
    first = int(bits) * length >> 32
    if parity == "llada":
        last = first + 1 + (samples - 1) * (length / samples)
        steps = torch.linspace(float(first + 1), last, steps=samples, device="cpu").round().long().numpy() - 1
    else:
        steps = first + np.arange(samples) * length // samples
    return steps % length + 1


def masked_targets(
    counts: np.ndarray, length: int, *, seed: int, request_id: int, place: int = 0
) -> np.ndarray:
    """Return which targets each sample masks, bool [samples, length]: counts[j] of them, all sets alike."""
    bits = _bits(len(counts), length, seed, request_id, place, _WHICH)
    rank = bits.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return rank < counts[:, None]


def _bits(rows: int, columns: int, seed: int, request_id: int, place: int, stream: int) -> np.ndarray:
    """Return uint32 [rows, columns]."""
    groups = -(-columns // 4)
    counter = np.empty((rows, groups, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(groups)
    counter[..., 1] = np.arange(rows)[:, None]
    counter[..., 2] = request_id
    counter[..., 3] = 2 * place + stream
    bits = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return bits.reshape(rows, 4 * groups)[:, :columns]
