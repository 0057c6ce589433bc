"""Likelihood estimators: the targets that a row masks and scores, and the estimate from the scores.

A segment is a run of targets that is denoised together: of a bidirectional model all targets of a request, of
a block-causal model those in one block. log p(target | context) is the sum over the segments of a request.

monte_carlo, block: E_k E_mask [L/k * sum of log p over the k masked targets], k uniform in 1..L, is a lower
    bound of log p of a segment [Ou et al. 2024; LLaDA]. The bounds of blocks add up [BD3LM].
ar_ftb, ar_btf: the chain rule with one row for each target, which is masked together with all targets after
    it (front to back) or before it (back to front) [Dream].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dllm_train.evaluate.masks import masked_counts, masked_targets


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows to compute for a segment of L targets.

    masked: bool [R, L], the targets that the mask token replaces in each of R rows, all distinct.
    scored: bool [R, L], the masked targets whose log p counts.
    value: from each row's sum of log p, float64 [R], to the segment's estimate and the variance of that.
    """

    masked: np.ndarray
    scored: np.ndarray
    value: Callable[[np.ndarray], tuple[float, float]]


def monte_carlo(length: int, samples: int, parity: str | None, **key: int) -> Plan:
    """Plan the bound of `length` targets; samples with equal masks share a row. key: that of the noise."""
    counts = masked_counts(length, samples, parity=parity, **key)
    drawn = masked_targets(counts, length, **key)
    _, first, row = np.unique(np.packbits(drawn, axis=1), axis=0, return_index=True, return_inverse=True)
    masked = drawn[first]

    def value(scores: np.ndarray) -> tuple[float, float]:
        values = scores[row.reshape(-1)] * (length / counts)
        return float(values.mean()), variance_of_mean(values, counts, length)

    return Plan(masked, masked, value)


def front_to_back(length: int) -> Plan:
    """Plan the chain rule from the first target to the last."""
    return _one_by_one(np.triu(np.ones((length, length), dtype=bool)))


def back_to_front(length: int) -> Plan:
    """Plan the chain rule from the last target to the first."""
    return _one_by_one(np.tril(np.ones((length, length), dtype=bool)))


def _one_by_one(masked: np.ndarray) -> Plan:
    return Plan(masked, np.eye(len(masked), dtype=bool), lambda scores: (float(scores.sum()), 0.0))


def variance_of_mean(values: np.ndarray, counts: np.ndarray, length: int) -> float:
    """Return the variance of the mean of stratified samples: sum over strata of size * variance / samples**2.

    values: float64 [n]; counts: int64 [n], how many of `length` targets each masks. Samples of equal counts
    form a stratum if every count has two, else neighbors in the order of counts do (collapsed strata, Cochran
    1977, 5A.12), which errs on the safe side. NaN for one sample of a segment that has several masks.
    """
    samples = len(values)
    if samples == 1:
        return 0.0 if length == 1 else float("nan")
    stratum, sizes = np.unique(counts, return_inverse=True, return_counts=True)[1:]
    if sizes.min() < 2:
        stratum = np.empty(samples, dtype=np.int64)
        stratum[counts.argsort(kind="stable")] = np.minimum(np.arange(samples) // 2, samples // 2 - 1)
        sizes = np.bincount(stratum)
    means = np.bincount(stratum, values) / sizes
    squares = np.bincount(stratum, (values - means[stratum]) ** 2)
    return float((sizes * squares / (sizes - 1)).sum() / samples**2)
