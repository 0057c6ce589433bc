"""Root mean square normalization, alone or of a sum with the residual stream [Zhang & Sennrich 2019]."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_optional_tensors, check_tensors, number
from . import reference
from ._autograd import register_derivative, register_no_derivative
from ._fake import register_elsewhere, register_fake

_ops = torch.ops.dllm_kernels


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return weight · x / √(mean(x²) + eps) over the last dimension; with `residual`, that of x + residual,
    and the sum itself.

    x [..., D] and residual [..., D], any strides, and weight [D], all of one dtype: float32, bfloat16 or
    float16. Arithmetic is float32; the normalized value is rounded to the dtype before it is multiplied by
    weight, as in transformers' LlamaRMSNorm, and so is the sum before it is normalized.
    Differentiable once, in reverse mode, in all tensors. The backward pass recomputes the normalized value
    from x, the only activation that is kept. Its result has the same bits for any number of threads.
    Raises TypeError for arguments that are not Tensors, ValueError for other shapes, dtypes and devices.
    """
    check_tensors(x=x, weight=weight)
    check_optional_tensors(residual=residual)
    eps = number("eps", eps)
    if residual is None:
        return _ops.rms_norm(x, weight, eps)
    return _ops.add_rms_norm(x, residual, weight, eps)


# ---- fake kernels ----------------------------------------------------------------------------------------
@register_fake("rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape)


@register_fake("add_rms_norm")
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@register_fake("rms_norm_backward")
def _(grad, x, weight, eps, grad_sum, needs_grad_weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if needs_grad_weight else 0)


# ---- devices without a kernel ----------------------------------------------------------------------------
for _name in ("rms_norm", "add_rms_norm", "rms_norm_backward"):
    register_elsewhere(_name, getattr(reference, _name))


# ---- autograd --------------------------------------------------------------------------------------------
def _save_input(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad[:3]
    grad_x, grad_weight = _ops.rms_norm_backward(grad, x, weight, ctx.eps, None, needs_weight)
    return grad_x if needs_x else None, grad_weight if needs_weight else None, None


def _save_sum(ctx, inputs, output):
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _backward_of_sum(ctx, grad, grad_sum):
    total, weight = ctx.saved_tensors
    needs_x, needs_residual, needs_weight, _ = ctx.needs_input_grad[:4]
    grad_weight = None
    if grad is None:
        grad_total = grad_sum
    else:
        grad_total, grad_weight = _ops.rms_norm_backward(grad, total, weight, ctx.eps, grad_sum, needs_weight)
    return (
        grad_total if needs_x else None,
        grad_total if needs_residual else None,
        grad_weight if needs_weight else None,
        None,
    )


register_derivative("rms_norm", _backward, _save_input)
register_derivative("add_rms_norm", _backward_of_sum, _save_sum)
register_no_derivative(
    "rms_norm_backward", "take a gradient of a gradient through torch.nn.functional.rms_norm"
)
