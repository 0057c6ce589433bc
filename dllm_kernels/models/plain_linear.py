"""Which modules may be computed without calling them."""

from __future__ import annotations

from torch import nn


def is_plain_linear(module: object) -> bool:
    """Whether calling `module` is x · weightᵀ + bias and nothing else: no adapter, quantization or hook."""
    return (
        type(module) is nn.Linear
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)  # where accelerate puts its own
    )
