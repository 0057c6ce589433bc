"""block_attention by the kernels of Hopper, which take head dims 64 and 128 of 16-bit types there."""

import pytest
import torch

from dllm_kernels import SpanMask, block_attention
from dllm_kernels.ops import reference

pytestmark = pytest.mark.hopper
hardware = pytest.mark.hardware

DTYPES = [torch.bfloat16, torch.float16]
FLOOR = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
MASKS = {
    "none": lambda length: None,
    "causal": lambda length: SpanMask.causal(length),
    "window": lambda length: SpanMask.sliding_window(length, 9),
    "block_diffusion": lambda length: SpanMask.block_diffusion(length // 2, 32) if length % 2 == 0 else None,
    "many spans": lambda length: SpanMask.from_dense(torch.arange(length).expand(length, length) % 16 < 9),
}


def random_qkv(batch, heads, kv_heads, q_len, kv_len, dim, dtype):
    shapes = (batch, heads, q_len, dim), *[(batch, kv_heads, kv_len, dim)] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes]


def assert_right(gpu, q, k, v, mask, scale=None):
    """Within twice the error that the same dtype costs in PyTorch, plus a rounding floor."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    spans = None if mask is None else mask.spans
    out, lse = gpu(block_attention, q, k, v, mask, scale=scale, return_lse=True)
    exact, exact_lse = reference.block_attention(q.double(), k.double(), v.double(), spans, scale)
    rounded, _ = reference.block_attention(q, k, v, spans, scale)
    error, allowed = (out - exact).abs().max(), 2 * (rounded - exact).abs().max()
    assert error <= allowed + FLOOR[q.dtype]
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 63, 65, 128, 130, 300, pytest.param(4098, marks=hardware)])
def test_lengths_around_tile_borders(gpu, length, mask):
    assert_right(gpu, *random_qkv(1, 2, 1, length, length, 64, torch.bfloat16), MASKS[mask](length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_sequences_of_unequal_length_with_grouped_queries(gpu, dim, dtype):
    mask = SpanMask.block_diffusion(150, 32, lengths=torch.tensor([150, 77]))
    assert_right(gpu, *random_qkv(2, 4, 2, 300, 300, dim, dtype), mask)
    assert_right(gpu, *random_qkv(1, 3, 1, 19, 400, dim, dtype), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 4.0])
def test_any_scale(gpu, scale, dtype):
    assert_right(gpu, *random_qkv(1, 1, 1, 70, 300, 64, dtype), None, scale)


def test_largest_scores_that_move_from_tile_to_tile(gpu):
    q, k, v = random_qkv(1, 1, 1, 130, 600, 64, torch.float16)
    q[..., 0] = 1.0
    k[..., 0] = 0.5 * torch.arange(600)
    assert_right(gpu, q, k, v, None, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_that_see_nothing_get_zeros(gpu, dtype):
    spans = torch.zeros(1, 200, 2, 2, dtype=torch.int32)
    spans[:, 130:140, 0, 1] = 200
    q, k, v = random_qkv(1, 2, 2, 200, 200, 64, dtype)
    out, lse = gpu(block_attention, q, k, v, SpanMask(spans, 200), return_lse=True)
    blind = (spans[0, :, 0, 1] == 0).nonzero().flatten()
    assert (out[:, :, blind] == 0).all() and (lse[:, :, blind] == -torch.inf).all()
    exact, _ = reference.block_attention(q.float(), k.float(), v.float(), spans, 0.125)
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=2 * FLOOR[dtype])


@pytest.mark.parametrize("dim", [64, 128])
def test_keys_that_no_query_of_a_tile_sees_have_no_influence(gpu, dim):
    q, k, v = random_qkv(1, 1, 1, 160, 300, dim, torch.bfloat16)
    visible = torch.ones(160, 300, dtype=torch.bool)
    visible[:, 200:] = False
    visible[:128, 70:75] = False
    mask = SpanMask.from_dense(visible)
    expected = gpu(block_attention, q, k, v, mask)
    k[..., 200:, :], v[..., 200:, :] = torch.nan, torch.inf
    assert torch.equal(gpu(block_attention, q, k, v, mask), expected)
    k[..., 72, :], v[..., 72, :] = torch.nan, torch.inf
    out = gpu(block_attention, q, k, v, mask)
    assert torch.equal(out[..., :128, :], expected[..., :128, :]) and out[..., 128:, :].isnan().all()


def test_more_tiles_than_multiprocessors(gpu):
    mask = SpanMask.block_causal(260, 32)
    assert_right(gpu, *random_qkv(2, 5, 5, 260, 260, 64, torch.bfloat16), mask)


def test_any_strides(gpu):
    q, k, v = random_qkv(2, 2, 2, 150, 150, 64, torch.bfloat16)
    expected = gpu(block_attention, q, k, v)
    merged = torch.cat([x.transpose(1, 2) for x in (q, k, v)], 2)  # as a joint projection leaves them
    transposed = [x.transpose(1, 2) for x in merged.split(2, 2)]
    assert torch.equal(gpu(block_attention, *transposed), expected)
    one = [x[:1] for x in (q, k, v)]
    shared = [x.expand(2, -1, -1, -1) for x in one]
    torch.testing.assert_close(
        gpu(block_attention, *shared)[1:], gpu(block_attention, *one), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("length, repeats", [(300, 2), pytest.param(4096, 50, marks=hardware)])
def test_repeats_have_the_same_bits(gpu, length, repeats):
    q, k, v = random_qkv(1, 2, 1, length, length, 128, torch.bfloat16)
    mask = SpanMask.block_diffusion(length // 2, 32)
    first = gpu(block_attention, q, k, v, mask, return_lse=True)
    for _ in range(repeats):
        again = gpu(block_attention, q, k, v, mask, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
