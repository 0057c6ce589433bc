"""Gradients of block_attention by the kernels of Hopper, against autograd of the reference in float64."""

import pytest
import torch

from dllm_kernels import SpanMask
from dllm_kernels.ops import reference

pytestmark = pytest.mark.hopper
hardware = pytest.mark.hardware

FORWARD = torch.ops.dllm_kernels.block_attention
BACKWARD = torch.ops.dllm_kernels.block_attention_backward
FLOOR = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}  # of the largest gradient
DTYPES = list(FLOOR)
MASKS = {
    "none": lambda length: None,
    "causal": lambda length: SpanMask.causal(length),
    "window": lambda length: SpanMask.sliding_window(length, 9),
    "block_diffusion": lambda length: SpanMask.block_diffusion(length // 2, 32) if length % 2 == 0 else None,
    "many spans": lambda length: SpanMask.from_dense(torch.arange(length).expand(length, length) % 40 < 2),
}


def random_qkv(batch, heads, kv_heads, q_len, kv_len, dim, dtype):
    shapes = (batch, heads, q_len, dim), *[(batch, kv_heads, kv_len, dim)] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes]


def gradients(gpu, q, k, v, mask, grad_out, grad_lse=None, scale=0.2):
    def forward_and_backward(q, k, v, spans, grad_out, grad_lse):
        out, lse = FORWARD(q, k, v, spans, scale)
        return BACKWARD(grad_out, grad_lse, q, k, v, out, lse, spans, scale)

    return gpu(forward_and_backward, q, k, v, None if mask is None else mask.spans, grad_out, grad_lse)


def assert_right(gpu, q, k, v, mask, with_lse=True, scale=0.2):
    grad_out, grad_lse = torch.randn_like(q), torch.randn(q.shape[:3]) if with_lse else None
    mine = gradients(gpu, q, k, v, mask, grad_out, grad_lse, scale)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    out, lse = reference.block_attention(*exact, None if mask is None else mask.spans, scale)
    loss = (out * grad_out).sum()
    if with_lse:
        loss = loss + (lse * grad_lse)[lse.detach() > -torch.inf].sum()
    expected = torch.autograd.grad(loss, exact)
    for name, grad, wanted in zip("qkv", mine, expected, strict=True):
        wanted = wanted.nan_to_num()
        error = float((grad.double() - wanted).abs().max())
        assert error <= FLOOR[q.dtype] * max(1.0, float(wanted.abs().max())), name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 63, 65, 128, 130, 200, pytest.param(2050, marks=hardware)])
def test_lengths_around_tile_borders(gpu, length, mask):
    assert_right(gpu, *random_qkv(1, 2, 1, length, length, 64, torch.bfloat16), MASKS[mask](length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_sequences_of_unequal_length_with_grouped_queries(gpu, dim, dtype):
    mask = SpanMask.block_diffusion(100, 32, lengths=torch.tensor([100, 41]))
    assert_right(gpu, *random_qkv(2, 4, 2, 200, 200, dim, dtype), mask)
    assert_right(gpu, *random_qkv(1, 3, 1, 19, 300, dim, dtype), None, with_lse=False)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(gpu, scale):
    assert_right(gpu, *random_qkv(1, 2, 1, 70, 70, 64, torch.float16), SpanMask.causal(70), scale=scale)


def test_more_query_tiles_than_lanes_of_a_warp(gpu):
    """They are looked through in groups of 32."""
    mask = SpanMask.sliding_window(2200, 40)
    assert_right(gpu, *random_qkv(1, 1, 1, 2200, 2200, 64, torch.bfloat16), mask)


@pytest.mark.parametrize("dim", [64, 128])
def test_what_a_query_does_not_see_has_no_influence(gpu, dim):
    """Neither keys that nobody sees on the queries, nor queries that see nothing on the keys."""
    q, k, v = random_qkv(1, 2, 1, 200, 200, dim, torch.bfloat16)
    mask = SpanMask.block_causal(200, 32, lengths=torch.tensor([150]))
    grad_out = torch.randn_like(q)
    expected = gradients(gpu, q, k, v, mask, grad_out)
    for tensor in (q, k, v, grad_out):
        tensor[..., 150:, :] = torch.nan
    mine = gradients(gpu, q, k, v, mask, grad_out)
    for grad, wanted in zip(mine, expected, strict=True):
        assert torch.equal(grad[..., :150, :], wanted[..., :150, :])
        assert (wanted[..., 150:, :] == 0).all()
    assert (mine[1][..., 150:, :] == 0).all() and (mine[2][..., 150:, :] == 0).all()


@pytest.mark.parametrize("length, repeats", [(200, 2), pytest.param(2048, 50, marks=hardware)])
def test_repeats_have_the_same_bits(gpu, length, repeats):
    q, k, v = random_qkv(1, 2, 1, length, length, 128, torch.bfloat16)
    mask, grad_out = SpanMask.block_diffusion(length // 2, 32), torch.randn_like(q)
    first = gradients(gpu, q, k, v, mask, grad_out)
    for _ in range(repeats):
        again = gradients(gpu, q, k, v, mask, grad_out)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
