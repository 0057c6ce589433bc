"""Gradients of block_attention on CUDA against autograd through the reference in float64."""

import pytest
import torch

from dllm_kernels import SpanMask, block_attention
from dllm_kernels.ops import reference

FORWARD = torch.ops.dllm_kernels.block_attention
BACKWARD = torch.ops.dllm_kernels.block_attention_backward
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = list(FLOOR)
hardware = pytest.mark.hardware


def random_qkv(batch=1, heads=2, kv_heads=1, q_len=40, kv_len=None, dim=64, dtype=torch.bfloat16):
    kv_len = q_len if kv_len is None else kv_len
    shapes = (batch, heads, q_len, dim), *[(batch, kv_heads, kv_len, dim)] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes]


def differentiated(attention, q, k, v, grad_out, grad_lse):
    """Gradients of q, k and v by autograd; rows that see nothing take no part in that of lse."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    out, lse = attention(q, k, v)
    loss = (out * grad_out.to(out.dtype)).sum()
    if grad_lse is not None:
        loss = loss + (lse * grad_lse.to(lse.dtype))[lse.detach() > -torch.inf].sum()
    return [torch.nan_to_num(grad) for grad in torch.autograd.grad(loss, (q, k, v))]


def eager(q, k, v, visible, scale):
    """Attention as plain PyTorch computes it in the dtype of q."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = scale * (q @ k.transpose(-1, -2))
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v, scores.float().logsumexp(-1)


def gradients(gpu, q, k, v, spans, scale, grad_out, grad_lse=None):
    def forward_and_backward(q, k, v, spans, grad_out, grad_lse):
        out, lse = FORWARD(q, k, v, spans, scale)
        return BACKWARD(grad_out, grad_lse, q, k, v, out, lse, spans, scale)

    return gpu(forward_and_backward, q, k, v, spans, grad_out, grad_lse)


def assert_right(gpu, q, k, v, mask, with_lse=True, scale=0.3):
    """Within twice the error that the same dtype costs in PyTorch, plus a rounding floor."""
    spans = None if mask is None else mask.spans
    grad_out, grad_lse = torch.randn_like(q), torch.randn(q.shape[:3]) if with_lse else None
    mine = gradients(gpu, q, k, v, spans, scale, grad_out, grad_lse)
    exact = differentiated(
        lambda q, k, v: reference.block_attention(q, k, v, spans, scale),
        *(q.double(), k.double(), v.double()),
        *(grad_out, grad_lse),
    )
    visible = None if mask is None else mask.to_dense()[:, None]
    rounded = differentiated(lambda q, k, v: eager(q, k, v, visible, scale), q, k, v, grad_out, grad_lse)
    for name, grad, expected, theirs, like in zip("qkv", mine, exact, rounded, (q, k, v), strict=True):
        assert grad.dtype == like.dtype and grad.shape == like.shape
        if grad.numel() == 0:
            continue
        error, allowed = (float((t.double() - expected).abs().max()) for t in (grad, theirs))
        assert error <= 2 * allowed + FLOOR[q.dtype] * max(1.0, float(expected.abs().max())), name


MASKS = {
    "none": lambda length: None,
    "causal": lambda length: SpanMask.causal(length),
    "window": lambda length: SpanMask.sliding_window(length, 9),
    "block_causal": lambda length: SpanMask.block_causal(length, 32, torch.tensor([length - length // 3])),
    "many spans": lambda length: SpanMask.from_dense(torch.arange(length).expand(length, length) % 40 < 2),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 31, 33, 64, 65, 129, pytest.param(257, marks=hardware)])
def test_lengths_around_tile_borders(gpu, length, mask):
    assert_right(gpu, *random_qkv(q_len=length), MASKS[mask](length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 72, 128, 200, 256])
def test_every_dtype_and_head_dim_with_grouped_queries(gpu, dim, dtype):
    mask = SpanMask.block_diffusion(36, 8, lengths=torch.tensor([36, 11]))
    assert_right(gpu, *random_qkv(2, 4, 2, 72, 72, dim, dtype), mask)
    assert_right(gpu, *random_qkv(1, 3, 1, 19, 70, dim, dtype), None, with_lse=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_and_blind(gpu, dtype):
    for batch, q_len, kv_len in ((0, 8, 8), (1, 0, 8), (1, 8, 0)):
        for grad in gradients(
            gpu,
            *random_qkv(batch, 2, 2, q_len, kv_len, 16, dtype),
            None,
            0.3,
            torch.randn(batch, 2, q_len, 16).to(dtype),
        ):
            assert (grad == 0).all()
    blind = torch.zeros(1, 40, 2, 2, dtype=torch.int32)
    q, k, v = random_qkv(dtype=dtype)
    assert all((grad == 0).all() for grad in gradients(gpu, q, k, v, blind, 0.3, torch.randn_like(q)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(gpu, scale, dtype):
    assert_right(gpu, *random_qkv(dtype=dtype), SpanMask.causal(40), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_nobody_sees_has_no_influence(gpu, dtype):
    """Neither keys that no query sees nor queries that see no key, whatever they hold."""
    q, k, v = random_qkv(2, 4, 2, 80, 80, 16, dtype)
    mask = SpanMask.block_diffusion(40, 4, lengths=torch.tensor([40, 13]))
    grad_out, visible = torch.randn_like(q), mask.to_dense()
    expected = gradients(gpu, q, k, v, mask.spans, 0.3, grad_out)
    hidden, blind = ~visible.any(1), ~visible.any(2)
    for tensor, rows in ((k, hidden), (v, hidden), (q, blind), (grad_out, blind)):
        tensor.transpose(1, 2)[rows] = torch.nan
    grads = gradients(gpu, q, k, v, mask.spans, 0.3, grad_out)
    assert all(map(torch.equal, grads, expected))
    for grad, rows in zip(grads, (blind, hidden, hidden), strict=True):
        assert (grad.transpose(1, 2)[rows] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_alignment(gpu, dtype):
    q, k, v = random_qkv(2, 2, 2, 50, 50, 32, dtype)
    grad_out = torch.randn_like(q)
    expected = gradients(gpu, q, k, v, None, 0.3, grad_out)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    columns = k.transpose(2, 3).contiguous().transpose(2, 3)
    shifted = torch.empty(v.numel() + 1, dtype=dtype)[1:].view(v.shape).copy_(v)
    grads = gradients(gpu, transposed, columns, shifted, None, 0.3, grad_out)
    assert all(map(torch.equal, grads, expected))
    ones = torch.ones((), dtype=dtype).expand(q.shape)
    expected = gradients(gpu, q, k, v, None, 0.3, ones.contiguous())
    assert all(map(torch.equal, gradients(gpu, q, k, v, None, 0.3, ones), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_find_queries_beyond_the_first_list(gpu, dtype):
    """A list holds 128 tiles of queries, of 16 each at this head dim; most tiles see nothing here."""
    length = 16 * 300
    visible = torch.zeros(length, 6, dtype=torch.bool)
    for query in (3, 100, 2047, 2048, 2100, 4700, length - 1):
        visible[query, query % 5 :] = True
    assert_right(gpu, *random_qkv(1, 2, 1, length, 6, 136, dtype), SpanMask.from_dense(visible))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length, repeats", [(70, 1), pytest.param(300, 20, marks=hardware)])
def test_same_bits_again_and_in_any_batch(gpu, length, repeats, dtype):
    q, k, v = random_qkv(1, 4, 2, length, dim=128, dtype=dtype)
    spans = SpanMask.block_causal(length, 32).spans
    grad_out = torch.randn_like(q)
    first = gradients(gpu, q, k, v, spans, 0.1, grad_out)
    for _ in range(repeats):
        assert all(map(torch.equal, gradients(gpu, q, k, v, spans, 0.1, grad_out), first))
    pairs = [torch.cat([torch.randn_like(t), t]) for t in (q, k, v, grad_out)]
    together = gradients(gpu, *pairs[:3], spans, 0.1, pairs[3])
    assert all(torch.equal(grad[1:], alone) for grad, alone in zip(together, first, strict=True))


def test_autograd_reaches_them(gpu):
    mask = SpanMask.block_diffusion(30, 4)
    inputs = [t.requires_grad_() for t in random_qkv(2, 4, 2, 60, 60, 16, torch.float32)]

    def autograd(q, k, v, mask):
        return torch.autograd.grad(block_attention(q, k, v, mask).square().sum(), (q, k, v))

    torch.testing.assert_close(gpu(autograd, *inputs, mask), autograd(*inputs, mask), rtol=1e-4, atol=1e-4)
