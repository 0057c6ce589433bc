"""cached_block_attention on a GPU against torch's attention over gathered keys, and FlashInfer's."""

import pytest
import torch

import dllm_kernels as dk
from benchmarks import baselines
from benchmarks.workloads import cached_flops, cached_step

SHAPES = {
    "multi-head": {"heads": 32, "kv_heads": 32, "head_dim": 128},
    "grouped": {"heads": 32, "kv_heads": 8, "head_dim": 128},
}


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("cached", [1200, 4096, 16384])
def test_cached_block_attention(compare, pick, device, cached, heads):
    cached, shape = pick(cached, 48), SHAPES[heads]
    compare(
        lambda *step: dk.cached_block_attention(*step[:7]),
        baselines.gathered_attention(),
        inputs=lambda: cached_step(cached, dtype=torch.bfloat16, device=device, **shape),
        title=f"cached_block_attention, 32 queries, {cached} cached, {heads}",
        flops=cached_flops(cached, **shape),
        bytes=2 * 2 * shape["kv_heads"] * shape["head_dim"] * cached,
        tolerance={"atol": 2e-2, "rtol": 2e-2},
        length=cached if heads == "multi-head" else None,
    )


def test_kv_write(compare, pick, device):
    """A block of 32 rows' keys and values into their pages, against torch's scatter."""
    batch, heads, block, head_dim, page = pick((32, 8, 32, 128, 32), (2, 2, 4, 16, 4))

    def inputs():
        k, v = torch.randn(2, batch, heads, block, head_dim, device=device, dtype=torch.bfloat16)
        cache = torch.randn(2, batch * 4, page, heads, head_dim, device=device, dtype=torch.bfloat16)
        table = torch.randperm(batch * 4, device=device).int().view(batch, 4)
        positions = torch.arange(block, device=device).int().expand(batch, block).contiguous() + page
        return *cache.unbind(), k, v, table, positions

    compare(
        dk.kv_write_,
        {"index_put": baselines.write_pages},
        inputs=inputs,
        title=f"kv_write_, {batch} rows of {block} tokens",
        bytes=2 * 2 * 2 * batch * heads * block * head_dim,
    )
