"""block_attention against torch's attention with a dense mask and against compiled flex_attention."""

import pytest
import torch

import dllm_kernels as dk
from benchmarks import baselines

BLOCK = 32
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
TOLERANCE_BF16 = {"atol": 2e-2, "rtol": 2e-2}


def attention_inputs(length, *, batch=1, heads=8, kv_heads=8, head_dim=64, dtype=torch.float32, device="cpu"):
    def tensor(count):
        return torch.randn(batch, count, length, head_dim, dtype=dtype, device=device)

    return lambda: (tensor(heads), tensor(kv_heads), tensor(kv_heads))


def flops(length, density, *, heads=8, head_dim=64):
    """Of the two products; `density` of the square of scores is computed."""
    return 4 * heads * head_dim * length**2 * density


@pytest.mark.parametrize("seq_len", [1024, 4096])
def test_block_attention_bd3lm(compare, pick, smoke, seq_len):
    mask = dk.SpanMask.block_diffusion(pick(seq_len, 64), BLOCK)
    dense, length = mask.to_dense(), mask.kv_len
    others = {"sdpa": lambda q, k, v: baselines.sdpa(q, k, v, dense)}
    if not smoke:  # it takes a minute to compile
        others["flex"] = baselines.best_flex(mask, attention_inputs(length)())
    compare(
        lambda q, k, v: dk.block_attention(q, k, v, mask),
        others,
        inputs=attention_inputs(length),
        flops=flops(length, mask.density()),
        dense_flops=flops(length, 1),
        tolerance=TOLERANCE,
    )


def test_block_attention_full(compare, pick):
    length = pick(2048, 64)
    compare(
        dk.block_attention,
        {"sdpa": baselines.sdpa},
        inputs=attention_inputs(length),
        flops=flops(length, 1),
        tolerance=TOLERANCE,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("seq_len", [4096])
def test_block_attention_bd3lm_gpu(compare, pick, smoke, seq_len):
    shape = {"heads": 32, "head_dim": 128}
    mask = dk.SpanMask.block_diffusion(pick(seq_len, 256), BLOCK).to("cuda")
    length = mask.kv_len
    inputs = attention_inputs(length, kv_heads=32, dtype=torch.bfloat16, device="cuda", **shape)
    dense = mask.to_dense()
    others = {"sdpa": lambda q, k, v: baselines.sdpa(q, k, v, dense)}
    if not smoke:
        others["flex"] = baselines.best_flex(mask, inputs())
    compare(
        lambda q, k, v: dk.block_attention(q, k, v, mask),
        others,
        inputs=inputs,
        flops=flops(length, mask.density(), **shape),
        dense_flops=flops(length, 1, **shape),
        tolerance=TOLERANCE_BF16,
    )
