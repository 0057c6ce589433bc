"""The product of a gated MLP: silu(gate) · up [Shazeer 2020]."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_tensors
from . import reference
from ._autograd import register_derivative, register_no_derivative
from ._fake import register_elsewhere, register_fake

_ops = torch.ops.dllm_kernels


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up, with silu(x) = x / (1 + e^−x).

    gate and up [..., I], any strides, of one shape and dtype: float32, bfloat16 or float16. Arithmetic is
    float32; silu(gate) is rounded to the dtype before the product, as in transformers' MLPs.
    Differentiable once, in reverse mode. The backward pass recomputes silu(gate): only gate and up are kept.
    Raises TypeError for arguments that are not Tensors, ValueError for other shapes, dtypes and devices.
    """
    check_tensors(gate=gate, up=up)
    return _ops.silu_mul(gate, up)


# ---- fake kernels ----------------------------------------------------------------------------------------
@register_fake("silu_mul")
def _(gate, up):
    return gate.new_empty(gate.shape)


@register_fake("silu_mul_backward")
def _(grad, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


# ---- devices without a kernel ----------------------------------------------------------------------------
for _name in ("silu_mul", "silu_mul_backward"):
    register_elsewhere(_name, getattr(reference, _name))


# ---- autograd --------------------------------------------------------------------------------------------
def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    grads = _ops.silu_mul_backward(grad, *ctx.saved_tensors)
    return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))


register_derivative("silu_mul", _backward, _save_for_backward)
register_no_derivative("silu_mul_backward", "take a gradient of a gradient through torch.nn.functional.silu")
