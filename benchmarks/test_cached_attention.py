"""cached_block_attention against torch's attention over keys and values that were gathered before."""

import pytest

import dllm_kernels as dk
from benchmarks import baselines
from benchmarks.workloads import cached_flops, cached_step

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize("cached", [1024, 4096, 8192])
def test_cached_block_attention(compare, pick, cached):
    cached = pick(cached, 64)
    compare(
        lambda *step: dk.cached_block_attention(*step[:7]),
        {"sdpa, gathered": lambda *step: baselines.sdpa(step[0], *step[7:])},
        inputs=lambda: cached_step(cached),
        title=f"cached_block_attention, 32 queries, {cached} cached",
        flops=cached_flops(cached),
        tolerance=TOLERANCE,
        length=cached,
    )
