"""A layer's rotation, cached attention and K/V write on a GPU: one launch beside the three operators."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import dllm_kernels as dk
from benchmarks import baselines
from benchmarks.workloads import cached_flops, cached_step

SHAPES = {
    "multi-head": {"heads": 32, "kv_heads": 32, "head_dim": 128},
    "grouped": {"heads": 32, "kv_heads": 8, "head_dim": 128},
}


def in_one(q, k, v, cache_k, cache_v, table, spans, cos, sin, positions, plan):
    return dk.attend_and_write_(
        q, k, v, cache_k, cache_v, table, spans, cos=cos, sin=sin, positions=positions, plan=plan
    )


def one_after_the_other(q, k, v, cache_k, cache_v, table, spans, cos, sin, positions, plan):
    q, k = dk.rotate_half(q, k, cos, sin)
    out = dk.cached_block_attention(q, k, v, cache_k, cache_v, table, spans, plan=plan)
    dk.kv_write_(cache_k, cache_v, k, v, table, positions)
    return out


def with_torch(q, k, v, cache_k, cache_v, table, spans, cos, sin, positions, plan):
    """PyTorch's rotation and scatter around our attention, which plans for itself."""
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    out = dk.cached_block_attention(q, k, v, cache_k, cache_v, table, spans)
    baselines.write_pages(cache_k, cache_v, k, v, table, positions)
    return out


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("cached", [1200, 4096])
def test_attend_and_write(compare, pick, device, cached, heads):
    """A block of 32 queries, of which all are kept."""
    cached, shape, block = pick(cached, 64), SHAPES[heads], 32

    def inputs():
        step = cached_step(cached + block, dtype=torch.bfloat16, device=device, **shape)[:7]
        q, k, v, cache_k, cache_v, table, _ = step
        spans = torch.tensor([[[[0, cached]]]], dtype=torch.int32, device=device)
        phase = torch.rand(1, block, shape["head_dim"] // 2, device=device).repeat(1, 1, 2)
        positions = torch.arange(cached, cached + block, device=device, dtype=torch.int32)[None]
        angles = phase.cos().bfloat16(), phase.sin().bfloat16()
        plan = dk.cached_attention_plan(q, k, cache_k, table, spans)
        return q, k, v, cache_k, cache_v, table, spans, *angles, positions, plan

    compare(
        in_one,
        {
            "three operators": one_after_the_other,
            "PyTorch around attention": with_torch,
        },
        inputs=inputs,
        title=f"attend_and_write_, 32 queries, {cached} cached, {heads}",
        flops=cached_flops(cached, **shape),
        bytes=2 * 2 * shape["kv_heads"] * shape["head_dim"] * (cached + 2 * block),
        tolerance={"atol": 2e-2, "rtol": 2e-2},
    )
