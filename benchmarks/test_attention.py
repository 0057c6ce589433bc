"""block_attention against torch's attention with a dense mask and against compiled flex_attention."""

import pytest

import dllm_kernels as dk
from benchmarks import baselines
from benchmarks.workloads import GRADIENT_FLOPS, attention_flops, attention_inputs, with_gradients

BLOCK = 32
SDPA_LONGEST = 4096
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
GRADIENT_TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}


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
        title=f"block_attention, BD3LM mask, L = {mask.kv_len // 2}",
        flops=attention_flops(length, mask.density()),
        dense_flops=attention_flops(length, 1),
        tolerance=TOLERANCE,
    )


@pytest.mark.parametrize("seq_len", [256, 512, 1024, 2048, 4096, 8192])
def test_block_attention_scaling(compare, pick, smoke, seq_len):
    """The BD3LM mask over twice L tokens; the dense mask of the longest takes torch minutes."""
    mask = dk.SpanMask.block_diffusion(pick(seq_len, 64), BLOCK)
    dense = mask.to_dense() if smoke or seq_len <= SDPA_LONGEST else None
    compare(
        lambda q, k, v: dk.block_attention(q, k, v, mask),
        {} if dense is None else {"sdpa": lambda q, k, v: baselines.sdpa(q, k, v, dense)},
        inputs=attention_inputs(mask.kv_len),
        title=f"block_attention, BD3LM mask, L = {mask.kv_len // 2}, with memory",
        flops=attention_flops(mask.kv_len, mask.density()),
        tolerance=TOLERANCE,
        length=seq_len,
        memory=True,
    )


@pytest.mark.parametrize("seq_len", [1024])
def test_block_attention_bd3lm_with_gradients(compare, pick, seq_len):
    mask = dk.SpanMask.block_diffusion(pick(seq_len, 64), BLOCK)
    dense, length = mask.to_dense(), mask.kv_len
    compare(
        with_gradients(lambda q, k, v: dk.block_attention(q, k, v, mask)),
        {"sdpa": with_gradients(lambda q, k, v: baselines.sdpa(q, k, v, dense))},
        inputs=attention_inputs(length),
        title=f"block_attention, BD3LM mask, L = {length // 2}, forward and backward",
        flops=GRADIENT_FLOPS * attention_flops(length, mask.density()),
        dense_flops=GRADIENT_FLOPS * attention_flops(length, 1),
        tolerance=GRADIENT_TOLERANCE,
        memory=True,
    )


def test_block_attention_full(compare, pick):
    length = pick(2048, 64)
    compare(
        dk.block_attention,
        {"sdpa": baselines.sdpa},
        inputs=attention_inputs(length),
        title=f"block_attention, no mask, {length} tokens",
        flops=attention_flops(length, 1),
        tolerance=TOLERANCE,
    )
