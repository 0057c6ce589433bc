"""Gradient checkpointing that keeps results costly to recompute, and recomputes the rest.

It keeps the results of attention and most matrix products of a layer. Norms, rotations and activations are
recomputed. So are the products that end in the residual stream: the last one of a layer is not needed at
all, and the one after attention costs least for the memory it takes. Gradients are those of the whole layer,
bit for bit.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
_ATTENTION = {
    "dllm_kernels::block_attention", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
}  # fmt: skip


def checkpoint_selectively(model: nn.Module) -> None:
    """Make the layers of a transformers model recompute cheap operations.

    Raises ValueError for a model whose layers cannot be recomputed.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"selective_checkpointing: {type(model).__name__} cannot recompute its layers")
    contexts = functools.partial(_contexts, model.config.get_text_config().hidden_size)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": contexts})


def _contexts(hidden_size: int):
    """Return the contexts of a layer's forward and of its recomputation."""
    return create_selective_checkpoint_contexts(_Policy(hidden_size))


class _Policy:
    """Decides whether to keep an operator's result; called for all in turn, and again in recomputation."""

    def __init__(self, hidden_size: int):
        self.hidden_size = hidden_size
        self.attended = {False: False, True: False}  # by whether the layer is recomputed

    def __call__(self, context, operator, *args, **kwargs) -> CheckpointPolicy:
        keep = False
        if operator in _PRODUCTS:
            weight = args[-1]
            to_residual = self.attended[context.is_recompute] and weight.shape[-1] == self.hidden_size
            keep = not to_residual
        elif operator.name().split(".")[0] in _ATTENTION:
            keep = self.attended[context.is_recompute] = True
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
