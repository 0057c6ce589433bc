"""Rotary position embedding in the layout of GPT-NeoX, Llama and Qwen [Su et al. 2021]."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_tensors
from . import reference
from ._autograd import register_derivative, register_no_derivative
from ._fake import register_elsewhere, register_fake
from .reference.layer import turned

_ops = torch.ops.dllm_kernels


def rotate_half(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return query and key rotated by their positions: x · cos + (−x₂, x₁) · sin, x = (x₁, x₂) in halves.

    query [B, H, S, D] and key [B, Hkv, S, D] with D even, any strides; cos and sin [B or 1, S, D], as
    transformers' rotary modules return them; all of one dtype: float32, bfloat16 or float16. Both products
    are rounded to the dtype before they are added, as in transformers' `apply_rotary_pos_emb`.
    The results are stored as [B, S, H, D]. Differentiable once, in reverse mode, in all tensors; the
    gradient of query and key needs cos and sin only.
    Raises TypeError for arguments that are not Tensors, ValueError for other shapes, dtypes and devices.
    """
    check_tensors(query=query, key=key, cos=cos, sin=sin)
    return _ops.rotate_half(query, key, cos, sin)


# ---- fake kernels ----------------------------------------------------------------------------------------
def _empty_heads(like: Tensor) -> Tensor:
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


@register_fake("rotate_half")
def _(query, key, cos, sin):
    return _empty_heads(query), _empty_heads(key)


@register_fake("rotate_half_backward")
def _(grad_query, grad_key, cos, sin):
    return _empty_heads(grad_query), _empty_heads(grad_key)


# ---- devices without a kernel ----------------------------------------------------------------------------
for _name in ("rotate_half", "rotate_half_backward"):
    register_elsewhere(_name, getattr(reference, _name))


# ---- autograd --------------------------------------------------------------------------------------------
def _save_for_backward(ctx, inputs, output):
    query, key, cos, sin = inputs
    learned = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(cos, sin, *((query, key) if learned else ()))


def _backward(ctx, grad_query, grad_key):
    cos, sin, *heads = ctx.saved_tensors
    grads = _ops.rotate_half_backward(grad_query, grad_key, cos, sin)
    grads += _angle_gradients((grad_query, grad_key), heads, cos, sin) if heads else (None, None)
    return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))


def _angle_gradients(grads: tuple, heads: list[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of cos and sin, summed over heads, and over sequences that share them."""
    pairs = [(grad.float(), x.float()) for grad, x in zip(grads, heads, strict=True)]
    of_cos = torch.stack([(grad * x).sum(1) for grad, x in pairs]).sum(0)
    of_sin = torch.stack([(grad * turned(x)).sum(1) for grad, x in pairs]).sum(0)
    return of_cos.sum_to_size(cos.shape).to(cos.dtype), of_sin.sum_to_size(sin.shape).to(sin.dtype)


register_derivative("rotate_half", _backward, _save_for_backward)
register_no_derivative(
    "rotate_half_backward", "take a gradient of a gradient through x * cos + rotate_half(x) * sin of torch"
)
