"""Linear layers whose weights are stored in fewer bytes, and read by `skinny_linear`.

A step of a cached sampler computes a block of some 32 rows: the time of its linear layers is that of reading
their weights. Activations stay in the model's dtype.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_kernels.models.merged_projections import is_plain_linear
from dllm_kernels.ops.skinny_linear import quantize_weight, skinny_linear

KINDS = ("float32", "bfloat16", "int8")
FEW_ROWS = 64  # of float32 weights; beyond, the library's product is faster


def store_weights(model: nn.Module, kind: str) -> int:
    """Store the weights of linear layers in `model` as `kind` from now on; return the number of layers.

    "float32": as they are, but read by `skinny_linear` for few rows. "bfloat16", "int8": rounded, int8 with
    one scale for each output. Embeddings, the vocabulary projection, shared weights, biases, norms and layers
    that are not plain nn.Linear stay as they are. Rounded weights are no Parameters any more: they cannot be
    trained. Memory: one layer besides the model.

    Raises ValueError for another kind, a model that is not on the CPU, one without such layers, and for
    infinities and NaN in int8; the model is then as it was.
    """
    if kind not in KINDS:
        raise ValueError(f"weights is {kind!r}; allowed: {', '.join(KINDS)}")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"weights={kind!r} is for models on the CPU, and this one is on {device}")
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        (parent, name, module)
        for parent in model.modules()
        for name, module in parent._modules.items()
        if module is not head and is_plain_linear(module) and owners[id(module.weight)] == 1
    ]
    if not found:
        raise ValueError(
            f"weights={kind!r}: this {type(model).__name__} has no plain nn.Linear beside its vocabulary "
            "projection, such as models with merged projections"
        )
    for _, name, module in found if kind == "int8" else ():
        if not module.weight.isfinite().all():
            raise ValueError(f"weights={kind!r}: a weight of {name} holds infinities or NaN")
    for parent, name, module in found:
        if kind == "float32":
            module.__class__ = SkinnyLinear
        else:
            parent._modules[name] = StoredLinear(module, kind)
    return len(found)


class SkinnyLinear(nn.Linear):
    """An nn.Linear that multiplies few rows by `skinny_linear`, where no gradient is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in] -> [..., out]."""
        few = x.numel() <= FEW_ROWS * self.in_features
        plain = few and x.device.type == "cpu" and x.dtype == self.weight.dtype
        if plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            return skinny_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class StoredLinear(nn.Module):
    """A linear layer with a weight in bfloat16, or in int8 with scales. The bias stays a Parameter."""

    scales: Tensor | None

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        weight, scales = linear.weight.detach(), None
        if kind == "int8":
            weight, scales = quantize_weight(weight)
        else:
            weight = weight.bfloat16()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.bias = linear.bias
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in] -> [..., out]. Raises NotImplementedError where a gradient is needed."""
        return skinny_linear(x, self.weight, self.bias, scales=self.scales)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={self.kind}"
