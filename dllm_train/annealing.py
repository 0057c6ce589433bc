"""Anneal a causal mask to a bidirectional one, token by token (DiffuLLaMA, Gong et al. 2024)."""

from __future__ import annotations

import numpy as np

from dllm_train.noise import philox4x32

ANNEALING_STREAM = 32


def annealed_reach(step: int, steps: float, length: int, seed: int = 0) -> int | None:
    """Return how many tokens ahead a query sees in optimizer step `step`, from 0; None: all.

    The bound grows linearly from 0 to `length` over `steps` steps. The reach is uniform on 0..bound. It is a
    function of (seed, step) alone, so that ranks agree and resumed runs continue.
    """
    if step >= steps:
        return None
    bound = int(length * step / steps)
    counter = np.array([step & 0xFFFFFFFF, 0, 0, ANNEALING_STREAM], dtype=np.uint32)
    bits = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return int(bits[0]) * (bound + 1) >> 32
