"""A linear layer for few rows, with float or 8-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_optional_tensors, check_tensors, integer
from ._autograd import register_no_derivative
from ._fake import register_fake

_ops = torch.ops.dllm_kernels


def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scales: Tensor | None = None
) -> Tensor:
    """Return x · weightᵀ + bias, for about 1 to 64 rows of x: the weight is read once.

    x: [..., inputs], float32, bfloat16 or float16; the result [..., outputs] has its dtype.
    weight: [outputs, inputs], float32, bfloat16, float16, or int8 with `scales`, float32 [outputs, groups]:
    see `quantize_weight`. bias: [outputs], of any float type. Sums are float32, and a row's result does not
    depend on the rows beside it. More rows are right too, but a library's product is faster then.

    int8: every row of x is quantized symmetrically to its largest magnitude, products and sums of bytes are
    exact (VNNI where the processor has it), and out = s_x Σ_g s_g Σ x_i w_i (W8A8, as LLM.int8() without
    outliers [Dettmers et al. 2022]). A row that is not finite gives NaN.

    CPU tensors only. There is no derivative: a backward pass raises NotImplementedError. Raises TypeError for
    arguments that are not Tensors, ValueError for other shapes, dtypes and devices.
    """
    check_tensors(x=x, weight=weight)
    check_optional_tensors(bias=bias, scales=scales)
    if x.is_cuda:
        raise ValueError(
            "skinny_linear: x must be on the CPU, got cuda; use torch.nn.functional.linear there"
        )
    return _ops.skinny_linear(x, weight, bias, scales)


def quantize_weight(weight: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 [outputs, inputs] and float32 scales [outputs, groups] of a weight: w ≈ w8 · scale.

    Symmetric, to nearest: the largest magnitude of a row, or of each `group_size` inputs of it, becomes 127.
    weight: [outputs, inputs], any float dtype. group_size: a multiple of 64 that divides the inputs. Raises
    TypeError, or ValueError for other shapes and group sizes, and for infinities and NaN.
    """
    check_tensors(weight=weight)
    if not weight.is_floating_point():
        raise TypeError(f"quantize_weight: weight must be a float Tensor, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"quantize_weight: weight must be [outputs, inputs], got shape {list(weight.shape)}")
    inputs = weight.shape[1]
    size = max(inputs, 1) if group_size is None else integer("group_size", group_size, 1)
    if group_size is not None and (size % 64 or inputs % size):
        raise ValueError(
            f"quantize_weight: group_size must be a multiple of 64 that divides the {inputs} inputs, "
            f"got {size}"
        )
    rows = weight.detach().float()
    if not rows.isfinite().all():
        raise ValueError("quantize_weight: weight holds infinities or NaN")
    groups = rows.reshape(len(rows), -1, size) if inputs else rows.new_zeros(len(rows), 1, 1)
    scales = groups.abs().amax(2) / 127
    steps = groups / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    quantized = steps.round().clamp(-127, 127).to(torch.int8)
    return quantized.reshape(len(rows), -1)[:, :inputs].contiguous(), scales


@register_fake("skinny_linear")
def _(x, weight, bias=None, scales=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register_no_derivative("skinny_linear", "call it under torch.no_grad(), or use torch.nn.functional.linear")
