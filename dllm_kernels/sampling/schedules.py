"""Schedules: how the masks of a block are spread over its steps, as a list of quotas."""

import functools
import math

import numpy as np
import torch


def llada_schedule(masks: int, steps: int) -> list[int]:
    """Quota of each of `steps` steps: masks // steps, one more in the first masks mod steps [LLaDA]."""
    _check(masks, steps)
    return [masks // steps + (step < masks % steps) for step in range(steps)]


def dllm_schedule(masks: int, steps: int, alpha: str = "linear") -> list[int]:
    """Quotas of dLLM, without its empty steps (so the list may be shorter than `steps`).

    With t = (S−j)/S and s = (S−j−1)/S: n = round-half-even(remaining·(1 − (1−α(s))/(1−α(t)))), α "linear" or
    "cosine", the ratio in float32 and the product in float64, as there (exact arithmetic gives others).
    """
    _check(masks, steps)
    quotas, remaining = [], masks
    for j in range(steps):
        quota = min(round(remaining * _dllm_share(j, steps, alpha)), remaining)
        remaining -= quota
        quotas.append(quota)
    return [quota for quota in quotas if quota]


def binomial_schedule(masks: int, steps: int, alpha: str, seed: int, draw: tuple[int, int]) -> list[int]:
    """`dllm_schedule` with each quota drawn from a binomial distribution, the last step taking all.

    A function of seed and `draw` (the row's number and the block's start) alone.
    """
    _check(masks, steps)
    random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, *draw]))
    quotas, remaining = [], masks
    for j in range(steps):
        quota = int(random.binomial(remaining, _dllm_share(j, steps, alpha)))
        remaining -= quota
        quotas.append(quota)
    return [quota for quota in quotas if quota]


_ALPHA = {"linear": lambda t: 1 - t, "cosine": lambda t: 1 - torch.cos(math.pi / 2 * (1 - t))}


def _dllm_share(j: int, steps: int, alpha: str) -> float:
    """Return the share of the masks left that step j takes, in float32."""
    t, s = (torch.tensor((steps - j - k) / steps, dtype=torch.float32, device="cpu") for k in (0, 1))
    alpha_t, alpha_s = _ALPHA[alpha](t), _ALPHA[alpha](s)
    return float(1 - (1 - alpha_s) / (1 - alpha_t))


def dream_schedule(masks: int, steps: int, eps: float = 1e-3, first: int = 0) -> list[int]:
    """Quotas of Dream: int(remaining·(1 − s/t)), t = linspace(1, eps, S+1); the last step takes all.

    Counted for each row by itself (the original takes the mean of the batch), in float32 as there. Quotas may
    be 0. first: where to begin, for masks that are left when so many steps are over.
    """
    _check(masks, steps)
    if not 0 < eps < 1:
        raise ValueError(f"eps is {eps}; it must lie between 0 and 1")
    quotas, remaining = [], masks
    for step in range(min(first, steps - 1), steps):
        quotas.append(dream_quota(remaining, step, steps, eps))
        remaining -= quotas[-1]
    return quotas


def dream_quota(masks: int, step: int, steps: int, eps: float = 1e-3) -> int:
    """Return how many of the masks left one step of `dream_schedule` takes."""
    return int(masks * _dream_shares(steps, eps)[step]) if step < steps - 1 else masks


@functools.lru_cache
def _dream_shares(steps: int, eps: float) -> torch.Tensor:
    """float32 [steps], the part of the masks left that each step takes."""
    t = torch.linspace(1, eps, steps + 1, dtype=torch.float32, device="cpu")
    return 1 - t[1:] / t[:-1]


def _check(masks: int, steps: int) -> None:
    if masks < 0:
        raise ValueError(f"masks is {masks}; it must be >= 0")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be >= 1")
