"""The loss of masked diffusion from logits: Σ_i w_i · CE_i over the masked positions.

The objective defines w_i: w(t) of MDLM and BD3LM, CART weights of Dream, divided by the normaliser.
Positions that are not masked have weight 0; they cost nothing and may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_tensors, integers
from . import reference
from ._autograd import register_derivative, register_in_place, register_no_derivative
from ._fake import register_fake

_ops = torch.ops.dllm_kernels


@overload
def diffusion_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    suppress_tokens: Sequence[int] | None = None,
    return_ce: Literal[False] = False,
) -> Tensor: ...
@overload
def diffusion_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    suppress_tokens: Sequence[int] | None = None,
    return_ce: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def diffusion_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    suppress_tokens: Sequence[int] | None = None,
    return_ce: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return Σ_i weights_i · CE_i, where CE_i = −ln softmax(logits_i)[targets_i].

    logits [..., V]; targets int64 [...]; weights [...], any float dtype. Logits are read once in the forward
    and once in the backward pass, rows of weight 0 never: their logits and targets may be anything.
    suppress_tokens: ids that are left out of the softmax, e.g. the mask token [SUBS, Sahoo et al. 2024].
    On a GPU the contents of targets are not checked: one outside the vocabulary makes its CE_i NaN, a
    suppressed one makes it infinite. At most 64 tokens may be suppressed there.
    Returns a scalar, float32 (float64 for float64 logits), and with return_ce each CE_i, detached, 0 where
    the weight is 0. Differentiable in logits, and in weights (learned schedules): the gradient is CE_i.
    Derivatives other than these, of second order or in forward mode, raise NotImplementedError.
    """
    check_tensors(logits=logits, targets=targets, weights=weights)
    suppress_tokens = integers("suppress_tokens", suppress_tokens)
    loss, ce, _ = _ops.diffusion_cross_entropy(logits, targets, weights, suppress_tokens)
    return (loss, ce) if return_ce else loss


# ---- fake kernels: shapes, dtypes and strides of what the compiled operators return ------------------
@register_fake("diffusion_cross_entropy")
def _(logits, targets, weights, suppress_tokens):
    precision = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(shape, dtype=precision) for shape in ((), targets.shape, targets.shape))


@register_fake("diffusion_cross_entropy_backward")
def _(grad_loss, logits, targets, weights, logsumexp, suppress_tokens):
    return logits.new_empty(logits.shape)


@register_fake("diffusion_cross_entropy_gradient_")
def _(logits, targets, weights, suppress_tokens):
    precision = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(shape, dtype=precision) for shape in ((), targets.shape))


# ---- devices without a kernel ---------------------------------------------------------------------------
for _name in (
    "diffusion_cross_entropy",
    "diffusion_cross_entropy_backward",
    "diffusion_cross_entropy_gradient_",
):
    torch.library.impl(f"dllm_kernels::{_name}", "CompositeExplicitAutograd")(getattr(reference, _name))


# ---- autograd -----------------------------------------------------------------------------------------
torch.library.define(
    "dllm_kernels::scaled_gradient",
    "(Tensor gradient, Tensor grad_loss, Tensor loss, ScalarType dtype) -> Tensor",
)


@torch.library.impl("dllm_kernels::scaled_gradient", "CompositeExplicitAutograd")
def _(gradient: Tensor, grad_loss: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient · grad_loss. `gradient` was computed with `loss`, so that a gradient of the result must
    pass through `loss`."""
    return (grad_loss * gradient).to(dtype)


@register_fake("scaled_gradient")
def _(gradient, grad_loss, loss, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _save_for_backward(ctx, inputs, output):
    logits, targets, weights, ctx.suppress_tokens = inputs
    loss, ce, logsumexp = output
    ctx.mark_non_differentiable(ce, logsumexp)
    ctx.save_for_backward(logits, targets, weights, loss, ce, logsumexp)


def _backward(ctx, grad_loss, *_):
    logits, targets, weights, loss, ce, logsumexp = ctx.saved_tensors
    grad_logits = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_logits = _ops.diffusion_cross_entropy_backward(
            grad_loss, logits, targets, weights, logsumexp, ctx.suppress_tokens
        )
    if ctx.needs_input_grad[2]:
        grad_weights = _ops.scaled_gradient(ce, grad_loss, loss, weights.dtype)
    return grad_logits, None, grad_weights, None


register_derivative("diffusion_cross_entropy", _backward, _save_for_backward)
for _name in ("diffusion_cross_entropy_backward", "scaled_gradient"):
    register_no_derivative(_name, "take a gradient of a gradient through torch's cross_entropy")
register_in_place("diffusion_cross_entropy_gradient_")
