"""The loss of masked diffusion from hidden states, which stores no logits but those of a chunk of rows.

Library products around the kernel that turns logits into their gradient in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_optional_tensors, check_tensors, integers, kind
from . import cross_entropy  # noqa: F401  (registers scaled_gradient)
from ._autocast import cast, register_autocast
from ._autograd import register_derivative
from ._fake import register_fake

_ops = torch.ops.dllm_kernels
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIN_CHUNK_ROWS = 512  # products of fewer rows are slower
CPU_BLOCK_IDS = 8192  # BLAS divides wider products of few rows unevenly among threads


@overload
def linear_diffusion_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    *,
    suppress_tokens: Sequence[int] | None = None,
    return_ce: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_diffusion_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    *,
    suppress_tokens: Sequence[int] | None = None,
    return_ce: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
    """Return `diffusion_cross_entropy` of logits = hidden · weightᵀ + bias, which exist for a chunk of rows.

    hidden [..., H]; weight [V, H] and bias [V] of the same dtype; the rest as there. Only rows of weight
    other than 0 are projected. Gradients of those of hidden, weight and bias that require one are made in the
    forward pass, chunk by chunk, and kept in float32 until the backward pass scales and rounds them.
    """
    check_tensors(hidden=hidden, weight=weight, targets=targets, weights=weights)
    check_optional_tensors(bias=bias)
    needs_grad = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    loss, ce, *_ = _ops.linear_diffusion_cross_entropy(
        hidden, weight, targets, weights, bias, integers("suppress_tokens", suppress_tokens), needs_grad
    )
    return (loss, ce) if return_ce else loss


@torch.library.impl("dllm_kernels::linear_diffusion_cross_entropy", "CompositeExplicitAutograd")
def _loss_and_gradients(
    hidden, weight, targets, weights, bias, suppress_tokens, needs_grad
) -> tuple[Tensor, ...]:
    """Return loss, ce and the gradients of hidden, weight and bias, as `_new_results` lays them out.

    Rows of weight other than 0 are taken up in chunks: logits = x · Wᵀ + b, the kernel replaces them by their
    gradient G, and then dx = G · W, dW += Gᵀ · x, db += Σ G.

    On a GPU the host waits once: the shapes of the products depend on how many weights are not 0.
    """
    _check(hidden, weight, targets, weights, bias, suppress_tokens, needs_grad)
    results = _new_results(hidden, weight, targets, bias, needs_grad)
    loss, ce, grad_hidden, grad_weight, grad_bias = results
    for result in (loss, ce, grad_hidden, grad_bias):
        result.zero_()
    targets, weights, states = targets.flatten(), weights.flatten(), hidden.reshape(-1, hidden.shape[-1])
    kept = weights.nonzero()[:, 0]
    if not len(kept):
        grad_weight.zero_()
        return results
    _check_targets(targets, kept, len(weight), suppress_tokens)

    # Half-precision products are fast on tensor cores only, and gradients are too small for float16.
    operands = torch.bfloat16 if hidden.is_cuda and hidden.dtype == torch.bfloat16 else loss.dtype
    weight, bias = weight.to(operands), None if bias is None else bias.to(operands)
    chunks = kept.chunk(-(-len(kept) // _chunk_rows(len(kept), weight)))
    buffer = weight.new_empty(len(chunks[0]), len(weight))
    for rows in chunks:
        x, logits = states[rows].to(operands), buffer[: len(rows)]
        _project(x, weight, bias, logits)
        of_rows = (logits, targets[rows], weights[rows], suppress_tokens)
        if any(needs_grad):
            loss_of_rows, ce_of_rows = _ops.diffusion_cross_entropy_gradient_(*of_rows)
        else:
            loss_of_rows, ce_of_rows, _ = _ops.diffusion_cross_entropy(*of_rows)
        loss += loss_of_rows
        ce.view(-1)[rows] = ce_of_rows
        if grad_hidden.numel():
            grad_hidden.view(states.shape)[rows] = (logits @ weight).to(loss.dtype)
        if grad_weight.numel():
            _add_product(grad_weight, logits.T, x, first=rows is chunks[0])
        if grad_bias.numel():
            grad_bias += logits.sum(0, dtype=loss.dtype)
    return results


def _new_results(hidden, weight, targets, bias, needs_grad) -> tuple[Tensor, ...]:
    """Allocate loss, ce, grad_hidden, grad_weight, grad_bias, in the precision of the arithmetic.

    needs_grad: which of hidden, weight and bias need a gradient; the others' have no elements.
    """
    precision = torch.promote_types(hidden.dtype, torch.float32)
    shapes = [
        tensor.shape if needed else (0,)
        for tensor, needed in zip((hidden, weight, bias), needs_grad, strict=True)
    ]
    return tuple(hidden.new_empty(shape, dtype=precision) for shape in ((), targets.shape, *shapes))


def _chunk_rows(rows: int, weight: Tensor) -> int:
    """Return the number of rows whose logits are as large as the hidden states of all `rows`."""
    vocabulary, size = weight.shape
    return max(MIN_CHUNK_ROWS, rows * size // vocabulary)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """Compute logits = x · weightᵀ + bias."""
    block = len(weight) if x.is_cuda else CPU_BLOCK_IDS
    for first in range(0, len(weight), block):
        ids = slice(first, first + block)
        if bias is None:
            torch.mm(x, weight[ids].T, out=logits[:, ids])
        else:
            torch.addmm(bias[ids], x, weight[ids].T, out=logits[:, ids])


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Compute total += a · b; the first product is written, not added."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


# ---- argument checks ----------------------------------------------------------------------------------
def _check(hidden, weight, targets, weights, bias, suppress_tokens, needs_grad) -> None:
    check_tensors(hidden=hidden, weight=weight, targets=targets, weights=weights)
    _require(hidden.dim() > 0 and hidden.dtype in _FLOATS, "hidden", "float [..., H]", hidden)
    vocabulary, rows = weight.shape[:1], hidden.shape[:-1]
    dtype = str(hidden.dtype).removeprefix("torch.")
    fits = weight.dim() == 2 and len(weight) > 0 and weight.shape[1:] == hidden.shape[-1:]
    _require(fits and weight.dtype == hidden.dtype, "weight", f"{dtype} [V, {hidden.shape[-1]}]", weight)
    if bias is not None:
        fits = bias.shape == vocabulary and bias.dtype == hidden.dtype
        _require(fits, "bias", f"{dtype} {list(vocabulary)}", bias)
    fits = targets.shape == rows and targets.dtype == torch.int64
    _require(fits, "targets", f"int64 {list(rows)}, an entry for each row of hidden", targets)
    fits = weights.shape == rows and weights.dtype in _FLOATS
    _require(fits, "weights", f"float {list(rows)}, an entry for each row of hidden", weights)
    for name, tensor in {"weight": weight, "targets": targets, "weights": weights, "bias": bias}.items():
        if tensor is not None and tensor.device != hidden.device:
            _refuse(f"{name} must be on the device of hidden ({hidden.device}), got {tensor.device}")
    if len(needs_grad) != 3 or (bias is None and needs_grad[2]):
        _refuse(f"needs_grad must say it of hidden, weight and bias, if there is one, got {list(needs_grad)}")
    for token in suppress_tokens:
        if not 0 <= token < len(weight):
            _refuse(f"suppress_tokens must lie between 0 and {len(weight) - 1}, got {token}")


def _check_targets(targets, kept, vocabulary, suppress_tokens) -> None:
    """Raise the errors of diffusion_cross_entropy; on a GPU contents are not checked."""
    if targets.is_cuda:
        return
    outside = (targets[kept] < 0) | (targets[kept] >= vocabulary)
    suppressed = torch.isin(targets[kept], targets.new_tensor(list(suppress_tokens)))
    for wrong, text in (
        (outside, f"lie between 0 and {vocabulary - 1}"),
        (suppressed, "not be one of suppress_tokens"),
    ):
        if wrong.any():
            row = int(kept[wrong][0])
            _refuse(f"targets must {text} where weights is not 0, got {int(targets[row])} in row {row}")


def _require(ok: bool, name: str, allowed: str, tensor: Tensor) -> None:
    if not ok:
        _refuse(f"{name} must be {allowed}, got {kind(tensor)}")


def _refuse(text: str) -> None:
    raise ValueError(f"linear_diffusion_cross_entropy: {text}")


# ---- fake kernel and autograd -----------------------------------------------------------------------
@register_fake("linear_diffusion_cross_entropy")
def _(hidden, weight, targets, weights, bias, suppress_tokens, needs_grad):
    return _new_results(hidden, weight, targets, bias, needs_grad)


def _save_gradients(ctx, inputs, output):
    hidden, _, _, weights, *_ = inputs
    loss, ce, *gradients = output
    ctx.mark_non_differentiable(ce, *gradients)
    ctx.save_for_backward(loss, ce, *gradients)
    ctx.set_materialize_grads(False)  # zeros for the outputs above would be as large as the head
    ctx.dtype, ctx.weights_dtype = hidden.dtype, weights.dtype


def _scale_gradients(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 7
    loss, ce, *gradients = ctx.saved_tensors
    grad_hidden, grad_weight, grad_bias = (
        _ops.scaled_gradient(gradient, grad_loss, loss, ctx.dtype) if ctx.needs_input_grad[index] else None
        for index, gradient in zip((0, 1, 4), gradients, strict=True)
    )
    grad_weights = (
        _ops.scaled_gradient(ce, grad_loss, loss, ctx.weights_dtype) if ctx.needs_input_grad[3] else None
    )
    return grad_hidden, grad_weight, None, grad_weights, grad_bias, None, None


register_derivative("linear_diffusion_cross_entropy", _scale_gradients, _save_gradients)


# ---- autocast: the head is cast as in F.linear, sums stay in float32 ------------------------------------
def _cast_head(hidden, weight, targets, weights, bias, *rest):
    dtype = torch.get_autocast_dtype(hidden.device.type)
    bias = None if bias is None else cast(bias, dtype)
    return cast(hidden, dtype), cast(weight, dtype), targets, weights, bias, *rest


register_autocast(_ops.linear_diffusion_cross_entropy.default, _cast_head)
