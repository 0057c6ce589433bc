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
            parent._modules[name] = StoredLinear.rounded(module, kind)
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
    """A linear layer with a weight in 16 bits, or in int8 with scales. The bias stays a Parameter."""

    scales: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor | None, bias: nn.Parameter | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind = str(weight.dtype).removeprefix("torch.")
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.bias = bias

    @classmethod
    def of(
        cls, weight: Tensor, scales: Tensor | None = None, bias: nn.Parameter | None = None
    ) -> StoredLinear:
        """Return a layer that stores a copy of `weight`, in eval mode.

        weight: bfloat16 or float16 [out, in], or int8 [out, in] with scales: float32 [out, groups], one for
        each in / groups inputs. bias: [out]. Raises ValueError for other dtypes and shapes.
        """
        quantized = weight.dtype == torch.int8
        if weight.dim() != 2 or not (quantized or weight.dtype in (torch.bfloat16, torch.float16)):
            raise ValueError(
                f"weight is {weight.dtype} {[*weight.shape]}; it must be bfloat16, float16 or int8 [out, in]"
            )
        if quantized != (scales is not None):
            raise ValueError(f"a weight in {weight.dtype} comes {'with' if quantized else 'without'} scales")
        if quantized:
            _check_scales(weight, scales)
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias is {[*bias.shape]}; it must be {[*weight.shape[:1]]}")
        return cls(weight.clone(), None if scales is None else scales.clone(), bias).eval()

    @classmethod
    def rounded(cls, linear: nn.Linear, kind: str) -> StoredLinear:
        """Return `linear` with its weight rounded to "bfloat16", or to "int8" with one scale per output."""
        weight = linear.weight.detach()
        parts = quantize_weight(weight) if kind == "int8" else (weight.bfloat16(), None)
        return cls.of(*parts, linear.bias).train(linear.training)

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight [out, in], scales [out, groups] or None), as `of` takes them."""
        return self.weight, self.scales

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in] -> [..., out]. Raises NotImplementedError where a gradient is needed."""
        return skinny_linear(x, self.weight, self.bias, scales=self.scales)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={self.kind}"


def _check_scales(weight: Tensor, scales: Tensor) -> None:
    rows, inputs = weight.shape
    fits = scales.dim() == 2 and len(scales) == rows and scales.shape[1] and not inputs % scales.shape[1]
    if scales.dtype != torch.float32 or not fits:
        raise ValueError(
            f"scales is {scales.dtype} {[*scales.shape]}; it must be float32 [{rows}, groups], and groups "
            f"must divide the {inputs} inputs"
        )
