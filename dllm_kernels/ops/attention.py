"""Attention of diffusion language models: every query sees a union of a few contiguous key ranges."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_optional_tensors, check_tensors, kind, number
from ..span_mask import SpanMask
from ._autocast import cast, register_autocast
from ._autograd import register_derivative, register_no_derivative
from ._fake import register_fake
from .vendor_attention import vendor_attention

_ops = torch.ops.dllm_kernels


@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: SpanMask | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax(scale * q kᵀ) v over the keys that `mask` shows; invisible tiles cost nothing.

    q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] with Hq a multiple of Hkv (grouped queries) and D a multiple
    of 8 up to 256; float32, bfloat16 or float16, float32 arithmetic. mask=None: every query sees every key.
    scale defaults to 1 / sqrt(D). Returns out [B, Hq, Sq, D], and with return_lse the natural logarithm of
    the softmax's denominator, float32 [B, Hq, Sq]. A query that sees nothing gets output 0 and lse -inf.
    Differentiable in q, k and v, once and in reverse mode; other derivatives raise NotImplementedError. On a
    GPU an installed library may serve long calls without a mask (`vendor_attention.backend` says when); with
    return_lse, and as torch.ops.dllm_kernels.block_attention, it is always ours.
    """
    check_tensors(q=q, k=k, v=v)
    spans = None
    if mask is not None:
        if not isinstance(mask, SpanMask):
            raise TypeError(
                f"mask must be a SpanMask or None, got {kind(mask)}; SpanMask.from_dense converts a bool mask"
            )
        if k.dim() == 4 and mask.kv_len != k.shape[2]:
            raise ValueError(f"mask.kv_len must be the number of keys ({k.shape[2]}), got {mask.kv_len}")
        spans = mask.spans
    elif not return_lse and (out := vendor_attention(q, k, v, _scale(q, scale))) is not None:
        return out
    out, lse = _ops.block_attention(q, k, v, spans, _scale(q, scale))
    return (out, lse) if return_lse else out


@overload
def cached_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    page_table: Tensor,
    cache_spans: Tensor,
    *,
    fresh_spans: Tensor | None = None,
    q_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    plan: Tensor | None = None,
) -> Tensor: ...
@overload
def cached_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    page_table: Tensor,
    cache_spans: Tensor,
    *,
    fresh_spans: Tensor | None = None,
    q_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def cached_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    page_table: Tensor,
    cache_spans: Tensor,
    *,
    fresh_spans: Tensor | None = None,
    q_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    plan: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from a step's queries to spans of a paged cache and to the step's own, fresh keys.

    q [B, Hq, Tq, D] and fresh k, v [B, Hkv, Tq, D] belong to the same Tq tokens; cache_k and cache_v
    [pages, page_size, Hkv, D]; page_table int32 [B, P]: token position p of sequence b lies in page
    page_table[b, p // page_size], offset p % page_size. cache_spans int32 [B, 1 or Tq, R, 2]: ranges of token
    positions that stay visible (1: the same for all queries). fresh_spans int32 [B, Tq, R, 2]: ranges of
    fresh keys, None = all. q_lengths int32 [B]: tokens from there on are neither query nor key and get output
    0 and lse -inf. Cached tokens outside all spans are never read. Returns as `block_attention`; a backward
    pass through it raises NotImplementedError.
    """
    check_tensors(
        q=q, k=k, v=v, cache_k=cache_k, cache_v=cache_v, page_table=page_table, cache_spans=cache_spans
    )
    check_optional_tensors(fresh_spans=fresh_spans, q_lengths=q_lengths, plan=plan)
    out, lse = _ops.cached_block_attention(
        q, k, v, cache_k, cache_v, page_table, cache_spans, fresh_spans, q_lengths, _scale(q, scale), plan
    )
    return (out, lse) if return_lse else out


def cached_attention_plan(
    q: Tensor,
    k: Tensor,
    cache_k: Tensor,
    page_table: Tensor,
    cache_spans: Tensor,
    q_lengths: Tensor | None = None,
) -> Tensor:
    """Return how `cached_block_attention` splits the keys of every sequence, for the layers of one forward.

    The arguments are those of the calls to come: of q, k and cache_k the sizes matter, of the others what
    they hold. The plan, int32, is for calls one after the other on one stream: a call works in it, and leaves
    it as it was. A call with the plan of other arguments gives other results. Nothing is planned on a CPU,
    where the plan is empty.
    """
    check_tensors(q=q, k=k, cache_k=cache_k, page_table=page_table, cache_spans=cache_spans)
    check_optional_tensors(q_lengths=q_lengths)
    return _ops.cached_attention_plan(q, k, cache_k, page_table, cache_spans, q_lengths)


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is not None:
        return number("scale", scale)
    return q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0


# ---- fake kernels: shapes, dtypes and strides of what the compiled operators return ------------------
def _empty_heads(like: Tensor) -> Tensor:
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _empty_output(q: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@register_fake("block_attention")
def _(q, k, v, spans, scale):
    return _empty_output(q)


@register_fake("cached_block_attention")
def _(q, k, v, cache_k, cache_v, page_table, cache_spans, fresh_spans, q_lengths, scale, plan=None):
    return _empty_output(q)


@register_fake("cached_attention_plan")
def _(q, k, cache_k, page_table, cache_spans, q_lengths):
    return q.new_empty(_plan_size(q.shape, k.shape[1]) if q.is_cuda else 0, dtype=torch.int32)


def _plan_size(shape: torch.Size, kv_heads: int) -> int:
    """Return the values of a plan for queries [B, Hq, Tq, D]: four of each sequence, and a counter for every
    four rows of a kv head."""
    batch, q_heads, q_len, _ = shape
    return batch * (4 + kv_heads * ((q_len * (q_heads // kv_heads) + 3) // 4))


@register_fake("block_attention_backward")
def _(grad_out, grad_lse, q, k, v, out, lse, spans, scale):
    return tuple(map(_empty_heads, (q, k, v)))


# ---- autograd -----------------------------------------------------------------------------------------
def _save_for_backward(ctx, inputs, output):
    q, k, v, spans, scale = inputs
    ctx.save_for_backward(q, k, v, spans, *output)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, spans, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _ops.block_attention_backward(grad_out, grad_lse, q, k, v, out, lse, spans, ctx.scale)
    needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
    return (*needed, None, None)


register_derivative("block_attention", _backward, _save_for_backward)
register_no_derivative(
    "block_attention_backward",
    "take a gradient of a gradient through torch's scaled_dot_product_attention, SDPBackend.MATH",
)
register_no_derivative(
    "cached_block_attention", "call it under torch.no_grad(), or train with block_attention"
)
register_no_derivative("cached_attention_plan", "a plan holds integers")


# ---- autocast: float32 and half-precision q, k, v are mixed there ------------------------------------
def _cast_qkv(q, k, v, *rest):
    dtype = torch.get_autocast_dtype(q.device.type)
    return *(cast(t, dtype) for t in (q, k, v)), *rest


def _cast_to_cache(q, k, v, cache_k, *rest):
    return *(cast(t, cache_k.dtype) for t in (q, k, v)), cache_k, *rest


def _cast_planned(q, k, cache_k, *rest):
    return cast(q, cache_k.dtype), cast(k, cache_k.dtype), cache_k, *rest


register_autocast(_ops.block_attention.default, _cast_qkv)
register_autocast(_ops.cached_attention_plan.default, _cast_planned)
register_autocast(_ops.cached_block_attention.default, _cast_to_cache)
