"""Attention over spans in plain PyTorch: dense masks, one line per step of the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layer import rotate_half


def visible_keys(spans: Tensor, kv_len: int) -> Tensor:
    """Return bool [B or 1, Sq, kv_len]: key k is in some [start, end) of spans [B or 1, Sq, R, 2]."""
    key = torch.arange(kv_len, device=spans.device)
    return ((spans[..., :1] <= key) & (key < spans[..., 1:])).any(-2)


def block_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, scale: float):
    """Return softmax(scale * q kᵀ) v over visible keys, and the logarithm of the softmax's denominator.

    q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] -> out as q, lse [B, Hq, Sq] in float32 (float64 for float64).
    A query that sees nothing has output 0 and lse -inf.
    """
    visible = None if spans is None else visible_keys(spans, k.shape[2])[:, None]
    return _attention(q, k, v, visible, scale)


def cached_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    page_table: Tensor,
    cache_spans: Tensor,
    fresh_spans: Tensor | None,
    q_lengths: Tensor | None,
    scale: float,
):
    """Lay the cache out by token position, append the fresh keys, then attend densely."""
    batch, _, length, _ = q.shape
    cached = page_table.shape[1] * cache_k.shape[1]
    rows = torch.arange(length)
    live = torch.ones(batch, length).bool() if q_lengths is None else rows < q_lengths[:, None]
    in_cache = visible_keys(cache_spans, cached).expand(batch, length, cached) & live[..., None]
    fresh = (
        torch.ones(batch, length, length).bool() if fresh_spans is None else visible_keys(fresh_spans, length)
    )
    fresh = fresh & live[..., None] & live[:, None]
    visible = torch.cat([in_cache, fresh], dim=-1)[:, None]

    def laid_out(cache: Tensor, new: Tensor) -> Tensor:
        pages = cache[page_table.clamp(0, len(cache) - 1).long()]  # [B, P, page_size, Hkv, D]
        tokens = torch.cat([pages.flatten(1, 2).transpose(1, 2), new], dim=2)
        return tokens.masked_fill(~visible.any(2)[..., None], 0)  # no query sees it: it may hold anything

    return _attention(q, laid_out(cache_k, k), laid_out(cache_v, v), visible, scale)


def kv_write_(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, page_table: Tensor, positions: Tensor):
    """Set cache[page_table[b, p // page_size], p % page_size] = token (b, t) for p = positions[b, t] >= 0."""
    page_size = cache_k.shape[1]
    for b, t in (positions >= 0).nonzero().tolist():
        page, offset = divmod(int(positions[b, t]), page_size)
        cache_k[page_table[b, page], offset] = k[b, :, t]
        cache_v[page_table[b, page], offset] = v[b, :, t]


def attend_and_write_(
    q, k, v, cache_k, cache_v, page_table, cache_spans, cos, sin, positions, fresh_spans, q_lengths, scale,
    plan=None,
):  # fmt: skip
    """Rotate, attend, then write. A plan changes nothing."""
    if cos is not None:
        q, k = rotate_half(q, k, cos, sin)
    pages = cache_k, cache_v, page_table
    result = cached_block_attention(q, k, v, *pages, cache_spans, fresh_spans, q_lengths, scale)
    if positions is not None:
        kv_write_(cache_k, cache_v, k, v, page_table, positions)
    return result


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float):
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (t.to(dtype).repeat_interleave(group, dim=1) for t in (k, v))
    scores = scale * (q.to(dtype) @ keys.transpose(-1, -2))
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return (weights @ values).to(q.dtype), lse


def block_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: Tensor | None,
    scale: float,
    chunk: int = 512,
):
    """Return gradients of q, k, v, `chunk` queries at a time: memory is chunk x Sk per head, never Sq x Sk.

    With P = exp(scale * q kᵀ - lse) and dS = P * (dO vᵀ - rowsum(dO * O) + dlse):
    dq = scale * dS k, dk = scale * dSᵀ q, dv = Pᵀ dO; heads of a group sum their dk and dv.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, q_heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    by_group = (batch, kv_heads, q_heads // kv_heads)
    queries, outs, grads = (t.to(dtype).reshape(*by_group, q_len, dim) for t in (q, out, grad_out))
    keys, values = k.to(dtype)[:, :, None], v.to(dtype)[:, :, None]
    shift = lse.masked_fill(lse == -math.inf, 0).reshape(*by_group, q_len, 1)
    row_sum = (grads * outs).sum(-1, keepdim=True)
    if grad_lse is not None:
        row_sum = row_sum - grad_lse.reshape(*by_group, q_len, 1)
    grad_q = torch.empty_like(queries)
    grad_k, grad_v = (torch.zeros(batch, kv_heads, kv_len, dim, dtype=dtype, device=q.device) for _ in "kv")
    for start in range(0, q_len, chunk):
        rows = slice(start, start + chunk)
        scores = scale * (queries[..., rows, :] @ keys.transpose(-1, -2))
        if spans is not None:
            scores = scores.masked_fill(~visible_keys(spans[:, rows], kv_len)[:, None, None], -math.inf)
        weights = torch.exp(scores - shift[..., rows, :])
        grad_scores = (
            scale * weights * (grads[..., rows, :] @ values.transpose(-1, -2) - row_sum[..., rows, :])
        )
        grad_q[..., rows, :] = grad_scores @ keys
        grad_k += (grad_scores.transpose(-1, -2) @ queries[..., rows, :]).sum(2)
        grad_v += (weights.transpose(-1, -2) @ grads[..., rows, :]).sum(2)
    return grad_q.reshape(q.shape).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
