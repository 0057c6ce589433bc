"""block_attention on a GPU against compiled flex_attention, torch's attention and FlashAttention 3."""

import pytest
import torch

import dllm_kernels as dk
from benchmarks import baselines
from benchmarks.workloads import GRADIENT_FLOPS, attention_flops, attention_inputs, with_gradients

BLOCK = 32
DTYPE = torch.bfloat16
TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}
HEADS = {"multi-head": {"heads": 32, "kv_heads": 32}, "grouped": {"heads": 32, "kv_heads": 8}}


def block_diffusion(seq_len, device):
    return dk.SpanMask.block_diffusion(seq_len, BLOCK).to(device)


def alternatives(mask, inputs, smoke):
    """flex_attention, and torch's attention with the dense mask where a GPU can hold its scores."""
    dense = mask.to_dense()
    others = {"sdpa": lambda q, k, v: baselines.sdpa(q, k, v, dense)}
    if not smoke:
        others["flex"] = baselines.best_flex(mask, inputs())
    return others


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_attention_bd3lm(compare, pick, smoke, device, head_dim, heads):
    mask, shape = block_diffusion(pick(4096, 64), device), HEADS[heads] | {"head_dim": head_dim}
    inputs = attention_inputs(mask.kv_len, dtype=DTYPE, device=device, **shape)
    compare(
        lambda q, k, v: dk.block_attention(q, k, v, mask),
        alternatives(mask, inputs, smoke),
        inputs=inputs,
        title=f"block_attention, BD3LM mask, L = {mask.kv_len // 2}, {heads}, head size {head_dim}",
        flops=attention_flops(mask.kv_len, mask.density(), **shape),
        dense_flops=attention_flops(mask.kv_len, 1, **shape),
        tolerance=TOLERANCE,
    )


@pytest.mark.parametrize("seq_len", [512, 1024, 2048, 4096, 8192])
def test_block_attention_scaling(compare, pick, smoke, device, seq_len):
    mask, shape = block_diffusion(pick(seq_len, 64), device), HEADS["multi-head"] | {"head_dim": 128}
    inputs = attention_inputs(mask.kv_len, dtype=DTYPE, device=device, **shape)
    compare(
        lambda q, k, v: dk.block_attention(q, k, v, mask),
        alternatives(mask, inputs, smoke),
        inputs=inputs,
        title=f"block_attention, BD3LM mask, L = {mask.kv_len // 2}",
        flops=attention_flops(mask.kv_len, mask.density(), **shape),
        tolerance=TOLERANCE,
        length=seq_len,
    )


def test_block_attention_bd3lm_with_gradients(compare, pick, smoke, device):
    mask, shape = block_diffusion(pick(4096, 64), device), HEADS["multi-head"] | {"head_dim": 128}
    inputs = attention_inputs(mask.kv_len, dtype=DTYPE, device=device, **shape)
    others = alternatives(mask, inputs, smoke)
    compare(
        with_gradients(lambda q, k, v: dk.block_attention(q, k, v, mask)),
        {name: with_gradients(attention) for name, attention in others.items()},
        inputs=inputs,
        title=f"block_attention, BD3LM mask, L = {mask.kv_len // 2}, forward and backward",
        flops=GRADIENT_FLOPS * attention_flops(mask.kv_len, mask.density(), **shape),
        dense_flops=GRADIENT_FLOPS * attention_flops(mask.kv_len, 1, **shape),
        tolerance={"atol": 5e-2, "rtol": 5e-2},
        memory=True,
    )


def test_block_attention_full(compare, pick, device):
    """Our kernel, which the public function leaves for a library in this case, beside these libraries."""
    length, shape = pick(4096, 64), HEADS["multi-head"] | {"head_dim": 128}
    compare(
        lambda q, k, v: torch.ops.dllm_kernels.block_attention(q, k, v, None, 128**-0.5)[0],
        baselines.full_attention(device) | {"dk.block_attention": dk.block_attention},
        inputs=attention_inputs(length, dtype=DTYPE, device=device, **shape),
        title=f"our attention kernel, no mask, {length} tokens",
        flops=attention_flops(length, 1, **shape),
        tolerance=TOLERANCE,
    )
