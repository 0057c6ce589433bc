"""block_attention against torch's attention with a dense mask and against compiled flex_attention."""

import pytest
import torch

import dllm_kernels as dk
from benchmarks import baselines

BLOCK = 32
SDPA_LONGEST = 4096
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
GRADIENT_TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
TOLERANCE_BF16 = {"atol": 2e-2, "rtol": 2e-2}


def attention_inputs(length, *, batch=1, heads=8, kv_heads=8, head_dim=64, dtype=torch.float32, device="cpu"):
    def tensor(count):
        return torch.randn(batch, count, length, head_dim, dtype=dtype, device=device)

    return lambda: (tensor(heads), tensor(kv_heads), tensor(kv_heads))


def flops(length, density, *, heads=8, head_dim=64):
    """Of the two products; `density` of the square of scores is computed."""
    return 4 * heads * head_dim * length**2 * density


def with_gradients(attention):
    """`attention` and the gradients of q, k and v under its output as the output's gradient."""

    def forward_and_backward(*qkv):
        qkv = [t.detach().requires_grad_() for t in qkv]
        out = attention(*qkv)
        return torch.autograd.grad(out, qkv, out.detach())

    return forward_and_backward


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


@pytest.mark.parametrize("seq_len", [256, 512, 1024, 2048, 4096, 8192])
def test_block_attention_scaling(compare, pick, smoke, seq_len):
    """The BD3LM mask over twice L tokens; the dense mask of the longest takes torch minutes."""
    mask = dk.SpanMask.block_diffusion(pick(seq_len, 64), BLOCK)
    dense = mask.to_dense() if smoke or seq_len <= SDPA_LONGEST else None
    compare(
        lambda q, k, v: dk.block_attention(q, k, v, mask),
        {} if dense is None else {"sdpa": lambda q, k, v: baselines.sdpa(q, k, v, dense)},
        inputs=attention_inputs(mask.kv_len),
        flops=flops(mask.kv_len, mask.density()),
        tolerance=TOLERANCE,
        size=seq_len,
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
        flops=3.5 * flops(length, mask.density()),  # two products forward, five backward
        dense_flops=3.5 * flops(length, 1),
        tolerance=GRADIENT_TOLERANCE,
        memory=True,
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
