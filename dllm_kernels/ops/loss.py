"""Losses of masked diffusion: Σ_i w_i · CE_i over the masked positions, from logits or from hidden states.

w_i is what the objective says: w(t) of MDLM and BD3LM, CART weights of Dream, divided by the normaliser.
Positions that are not masked have weight 0; they cost nothing and may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_tensors
from . import reference
from ._autocast import cast, register_autocast
from ._linear_loss import new_results

_ops = torch.ops.dllm_kernels


def diffusion_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    suppress_tokens: Sequence[int] | None = None,
    return_ce: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Σ_i weights_i · CE_i, where CE_i = −ln softmax(logits_i)[targets_i].

    logits [..., V]; targets int64 [...]; weights [...], any float dtype. Logits are read once in the forward
    and once in the backward pass, rows of weight 0 never: their logits and targets may be anything.
    suppress_tokens: ids that are left out of the softmax, e.g. the mask token [SUBS, Sahoo et al. 2024].
    On a GPU the contents of targets are not checked: one outside the vocabulary makes its CE_i NaN, a
    suppressed one makes it infinite. At most 64 tokens may be suppressed there.
    Returns a scalar, float32 (float64 for float64 logits), and with return_ce each CE_i, detached, 0 where
    the weight is 0. Differentiable in logits, and in weights (learned schedules): the gradient is CE_i.
    """
    check_tensors(logits=logits, targets=targets, weights=weights)
    loss, ce, _ = _ops.diffusion_cross_entropy(logits, targets, weights, list(suppress_tokens or ()))
    return (loss, ce) if return_ce else loss


def linear_diffusion_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    *,
    suppress_tokens: Sequence[int] | None = None,
    return_ce: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`diffusion_cross_entropy` of logits = hidden · weightᵀ + bias, which exist for a few rows at a time.

    hidden [..., H]; weight [V, H] and bias [V] of the same dtype; the rest as there. Only rows of weight
    other than 0 are projected. Gradients of those of hidden, weight and bias that require one are made in the
    forward pass, chunk by chunk, and kept in float32 until the backward pass scales and rounds them.
    """
    check_tensors(hidden=hidden, weight=weight, targets=targets, weights=weights)
    if bias is not None:
        check_tensors(bias=bias)
    needs_grad = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    loss, ce, *_ = _ops.linear_diffusion_cross_entropy(
        hidden, weight, targets, weights, bias, list(suppress_tokens or ()), needs_grad
    )
    return (loss, ce) if return_ce else loss


# ---- fake kernels: shapes, dtypes and strides of what the compiled operators return ------------------
@torch.library.register_fake("dllm_kernels::diffusion_cross_entropy")
def _(logits, targets, weights, suppress_tokens):
    precision = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(shape, dtype=precision) for shape in ((), targets.shape, targets.shape))


@torch.library.register_fake("dllm_kernels::diffusion_cross_entropy_backward")
def _(grad_loss, logits, targets, weights, logsumexp, suppress_tokens):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("dllm_kernels::diffusion_cross_entropy_gradient_")
def _(logits, targets, weights, suppress_tokens):
    precision = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(shape, dtype=precision) for shape in ((), targets.shape))


@torch.library.register_fake("dllm_kernels::linear_diffusion_cross_entropy")
def _(hidden, weight, targets, weights, bias, suppress_tokens, needs_grad):
    return new_results(hidden, weight, targets, bias, needs_grad)


# ---- devices without a kernel ---------------------------------------------------------------------------
for _name in (
    "diffusion_cross_entropy",
    "diffusion_cross_entropy_backward",
    "diffusion_cross_entropy_gradient_",
):
    torch.library.impl(f"dllm_kernels::{_name}", "CompositeExplicitAutograd")(getattr(reference, _name))


# ---- autograd -----------------------------------------------------------------------------------------
def _save_for_backward(ctx, inputs, output):
    logits, targets, weights, ctx.suppress_tokens = inputs
    _, ce, logsumexp = output
    ctx.mark_non_differentiable(ce, logsumexp)
    ctx.save_for_backward(logits, targets, weights, ce, logsumexp)


def _backward(ctx, grad_loss, *_):
    logits, targets, weights, ce, logsumexp = ctx.saved_tensors
    grad_logits = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_logits = _ops.diffusion_cross_entropy_backward(
            grad_loss, logits, targets, weights, logsumexp, ctx.suppress_tokens
        )
    if ctx.needs_input_grad[2]:
        grad_weights = (grad_loss * ce).to(weights.dtype)
    return grad_logits, None, grad_weights, None


def _save_gradients(ctx, inputs, output):
    hidden, _, _, weights, *_ = inputs
    _, ce, *gradients = output
    ctx.mark_non_differentiable(ce, *gradients)
    ctx.save_for_backward(ce, *gradients)
    ctx.set_materialize_grads(False)  # zeros for the outputs above would be as large as the head
    ctx.dtype, ctx.weights_dtype = hidden.dtype, weights.dtype


def _scale_gradients(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 7
    ce, *gradients = ctx.saved_tensors
    grad_hidden, grad_weight, grad_bias = (
        (grad_loss * gradient).to(ctx.dtype) if ctx.needs_input_grad[index] else None
        for index, gradient in zip((0, 1, 4), gradients, strict=True)
    )
    grad_weights = (grad_loss * ce).to(ctx.weights_dtype) if ctx.needs_input_grad[3] else None
    return grad_hidden, grad_weight, None, grad_weights, grad_bias, None, None


torch.library.register_autograd(
    "dllm_kernels::diffusion_cross_entropy", _backward, setup_context=_save_for_backward
)
torch.library.register_autograd(
    "dllm_kernels::linear_diffusion_cross_entropy", _scale_gradients, setup_context=_save_gradients
)


# ---- autocast: the head is cast as in F.linear, sums stay in float32 ------------------------------------
def _cast_head(hidden, weight, targets, weights, bias, *rest):
    dtype = torch.get_autocast_dtype(hidden.device.type)
    bias = None if bias is None else cast(bias, dtype)
    return cast(hidden, dtype), cast(weight, dtype), targets, weights, bias, *rest


register_autocast(_ops.linear_diffusion_cross_entropy.default, _cast_head)
