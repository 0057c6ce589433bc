"""cached_block_attention against torch's attention over keys and values that were gathered before."""

import pytest
import torch

import dllm_kernels as dk
from benchmarks import baselines

HEADS, KV_HEADS, HEAD_DIM, BLOCK, PAGE_SIZE = 8, 2, 64, 32, 32
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def step_inputs(cached):
    """q, fresh k and v, the cache's pages in random order, and the same keys and values gathered."""
    q, k, v = (torch.randn(1, heads, BLOCK, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    pages = cached // PAGE_SIZE
    page_table = torch.randperm(pages).int()[None]
    caches = [torch.randn(pages, PAGE_SIZE, KV_HEADS, HEAD_DIM) for _ in "kv"]
    gathered = [
        torch.cat([cache[page_table[0].long()].flatten(0, 1).transpose(0, 1)[None], fresh], 2).contiguous()
        for cache, fresh in zip(caches, (k, v), strict=True)
    ]
    return q, k, v, *caches, page_table, torch.tensor([[[[0, cached]]]], dtype=torch.int32), *gathered


@pytest.mark.parametrize("cached", [1024, 4096, 8192])
def test_cached_block_attention(compare, pick, cached):
    cached = pick(cached, 64)
    compare(
        lambda *step: dk.cached_block_attention(*step[:7]),
        {"sdpa, gathered": lambda *step: baselines.sdpa(step[0], *step[7:])},
        inputs=lambda: step_inputs(cached),
        flops=4 * HEADS * BLOCK * (cached + BLOCK) * HEAD_DIM,
        tolerance=TOLERANCE,
        size=cached,
    )
