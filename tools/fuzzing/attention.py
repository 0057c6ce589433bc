"""Attention over spans and pages against dense attention in float64, and the writes into pages."""

from __future__ import annotations

import torch

from dllm_kernels.ops import reference
from fuzzing.draw import FLOATS, TOLERANCE, Draw, close, equal


def _heads(draw: Draw, q_len: int, kv_len: int) -> dict:
    batch, kv_heads, dim = draw.integer(1, 3), draw.integer(1, 3), 8 * draw.integer(1, 8)
    dtype = draw.choice(FLOATS)
    q = draw.floats(batch, kv_heads * draw.integer(1, 3), q_len, dim, dtype=dtype)
    k, v = (draw.floats(batch, kv_heads, kv_len, dim, dtype=dtype) for _ in "kv")
    return {"q": q, "k": k, "v": v}


def block_attention(draw: Draw) -> dict:
    q_len, kv_len = draw.integer(0, 40), draw.integer(0, 70)
    heads = _heads(draw, q_len, kv_len)
    batch = draw.choice([1, len(heads["q"])])
    spans = draw.spans(batch, q_len, most=3, keys=kv_len) if draw.chance(0.7) else None
    return {**heads, "spans": spans, "scale": draw.number(0.05, 1.0)}


def check_block_attention(draw: Draw, call: dict, result) -> None:
    out, lse = reference.block_attention(**_in_float64(call))
    close("out", result[0], out, TOLERANCE[call["q"].dtype])
    close("lse", result[1], lse, TOLERANCE[call["q"].dtype])


def block_attention_backward(draw: Draw) -> dict:
    call = block_attention(draw)
    out, lse = torch.ops.dllm_kernels.block_attention(**call)
    grad_lse = torch.randn_like(lse) if draw.chance(0.5) else None
    grad_out = draw.floats(*out.shape, dtype=out.dtype)
    return {"grad_out": grad_out, "grad_lse": grad_lse, **call, "out": out, "lse": lse}


def check_block_attention_backward(draw: Draw, call: dict, result) -> None:
    wide = _in_float64(call)
    q, k, v = (wide[name] for name in "qkv")
    wide["out"], wide["lse"] = reference.block_attention(q, k, v, call["spans"], call["scale"])
    gradients = reference.block_attention_backward(**wide)
    for name, found, expected in zip("qkv", result, gradients, strict=True):
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        close(f"grad_{name}", found / size, expected / size, 3 * TOLERANCE[call["q"].dtype])


def _in_float64(call: dict) -> dict:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }


def _pages(draw: Draw, batch: int, kv_heads: int, dim: int, dtype: torch.dtype) -> dict:
    """Caches and a page table in which no page has two places."""
    page_size, per_row = draw.integer(1, 9), draw.integer(1, 5)
    pages = batch * per_row + draw.integer(0, 3)
    both = torch.randn(2, pages, page_size, kv_heads, dim).to(dtype)
    if draw.chance(0.3):  # keys and values of a token side by side
        both = torch.randn(pages, page_size, 2, kv_heads, dim).to(dtype).movedim(2, 0)
    table = torch.randperm(pages)[: batch * per_row].int().reshape(batch, per_row)
    return {"cache_k": both[0], "cache_v": both[1], "page_table": table}


def cached_block_attention(draw: Draw) -> dict:
    q_len = draw.integer(0, 20)
    heads = _heads(draw, q_len, q_len)
    batch, kv_heads, _, dim = heads["k"].shape
    pages = _pages(draw, batch, kv_heads, dim, heads["q"].dtype)
    keys = pages["page_table"].shape[1] * pages["cache_k"].shape[1]
    rows = draw.choice([1, q_len]) if q_len else 1
    lengths = torch.randint(0, q_len + 1, (batch,)).int() if draw.chance(0.5) else None
    fresh = draw.spans(batch, q_len, most=2, keys=q_len) if draw.chance(0.5) else None
    spans = draw.spans(batch, rows, most=2, keys=keys)
    return {
        **heads, **pages, "cache_spans": spans, "fresh_spans": fresh, "q_lengths": lengths,
        "scale": draw.number(0.05, 1.0),
    }  # fmt: skip


def check_cached_block_attention(draw: Draw, call: dict, result) -> None:
    out, lse = reference.cached_block_attention(**_in_float64(call))
    close("out", result[0], out, TOLERANCE[call["q"].dtype])
    close("lse", result[1], lse, TOLERANCE[call["q"].dtype])


def cached_attention_plan(draw: Draw) -> dict:
    call = cached_block_attention(draw)
    return {name: call[name] for name in ("q", "k", "cache_k", "page_table", "cache_spans", "q_lengths")}


def check_cached_attention_plan(draw: Draw, call: dict, result) -> None:
    assert result.dtype == torch.int32 and result.numel() == 0


def kv_write_(draw: Draw) -> dict:
    length = draw.integer(0, 12)
    heads = _heads(draw, 1, length)
    batch, kv_heads, _, dim = heads["k"].shape
    pages = _pages(draw, batch, kv_heads, dim, heads["k"].dtype)
    capacity = pages["page_table"].shape[1] * pages["cache_k"].shape[1]
    positions = torch.randint(-1, capacity, (batch, length)).int()
    return {**pages, "k": heads["k"], "v": heads["v"], "positions": positions}


def check_kv_write_(draw: Draw, call: dict, result, before: dict) -> None:
    reference.kv_write_(**before)
    for name in ("cache_k", "cache_v"):
        equal(name, call[name], before[name])


def attend_and_write_(draw: Draw) -> dict:
    """Rows see the first half of their pages and write into the second."""
    call = cached_block_attention(draw)
    batch, _, length, dim = call["q"].shape
    capacity = call["page_table"].shape[1] * call["cache_k"].shape[1]
    call["cache_spans"] = call["cache_spans"].clamp(max=capacity // 2)
    angles = {
        name: draw.floats(draw.choice([1, batch]), length, dim, dtype=call["q"].dtype)
        for name in ("cos", "sin")
    }
    if draw.chance(0.3):
        angles = dict.fromkeys(angles)
    positions = torch.randint(capacity // 2 - 1, capacity, (batch, length)).int()
    positions[positions < capacity // 2] = -1
    return {**call, **angles, "positions": positions if draw.chance(0.8) else None}


def check_attend_and_write_(draw: Draw, call: dict, result, before: dict) -> None:
    dtype = call["q"].dtype
    wide = _in_float64(before)
    if wide["cos"] is not None:  # rounded as the operator rounds
        rotated = torch.ops.dllm_kernels.rotate_half(*(before[name] for name in ("q", "k", "cos", "sin")))
        wide |= {"q": rotated[0].double(), "k": rotated[1].double(), "cos": None, "sin": None}
    out, lse = reference.attend_and_write_(**wide)
    close("out", result[0], out, TOLERANCE[dtype])
    close("lse", result[1], lse, TOLERANCE[dtype])
    for name in ("cache_k", "cache_v"):
        equal(name, call[name], wide[name].to(dtype))


CALLS = {
    "attend_and_write_": (attend_and_write_, check_attend_and_write_),
    "block_attention": (block_attention, check_block_attention),
    "block_attention_backward": (block_attention_backward, check_block_attention_backward),
    "cached_block_attention": (cached_block_attention, check_cached_block_attention),
    "cached_attention_plan": (cached_attention_plan, check_cached_attention_plan),
    "kv_write_": (kv_write_, check_kv_write_),
}
