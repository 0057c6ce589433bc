"""Gradients of block_attention on the CPU against autograd through the plain PyTorch reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dllm_kernels import SpanMask, block_attention
from dllm_kernels.ops import reference

FORWARD = torch.ops.dllm_kernels.block_attention.default
BACKWARD = torch.ops.dllm_kernels.block_attention_backward.default
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def random_qkv(batch=1, heads=2, kv_heads=None, q_len=40, kv_len=None, dim=16, dtype=torch.float32):
    kv_heads, kv_len = kv_heads or heads, q_len if kv_len is None else kv_len
    shapes = (batch, heads, q_len, dim), *[(batch, kv_heads, kv_len, dim)] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes]


def random_mask(batch, q_len, kv_len, spans):
    """Ranges of random width; a tenth of the rows sees nothing."""
    visible = torch.zeros(batch, q_len, kv_len).bool()
    key = torch.arange(kv_len)
    for cut in torch.randint(0, kv_len + 1, (spans, batch, q_len, 2)).sort(-1).values:
        visible |= (cut[..., :1] <= key) & (key < cut[..., 1:])
    visible[torch.rand(batch, q_len) < 0.1] = False
    return SpanMask.from_dense(visible)


def exact_gradients(q, k, v, spans, scale, grad_out, grad_lse):
    """By autograd in float64; rows that see nothing have no lse and take no part in its gradient."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    out, lse = reference.block_attention(q, k, v, spans, scale)
    loss = (out * grad_out.double()).sum()
    if grad_lse is not None:
        loss = loss + (lse * grad_lse.double())[lse.detach() > -torch.inf].sum()
    return [torch.nan_to_num(grad) for grad in torch.autograd.grad(loss, (q, k, v))]


def backward(q, k, v, spans, scale, grad_out, grad_lse):
    out, lse = FORWARD(q, k, v, spans, scale)
    return BACKWARD(grad_out, grad_lse, q, k, v, out, lse, spans, scale)


def assert_right(q, k, v, spans, grad_out, grad_lse):
    """Errors are those of sums of D products (grad_out · v), which cancel where the gradient is small."""
    mine = backward(q, k, v, spans, 0.3, grad_out, grad_lse)
    exact = exact_gradients(q, k, v, spans, 0.3, grad_out, grad_lse)
    for grad, expected, like in zip(mine, exact, (q, k, v), strict=True):
        assert grad.dtype == like.dtype and grad.shape == like.shape
        size = q.shape[-1] ** 0.5 + (float(expected.abs().max()) if expected.numel() else 0)
        bound = TOLERANCE[q.dtype] * size
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=bound)


@settings(max_examples=60)
@given(st.data())
def test_equal_those_of_the_reference_in_float64(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    batch, kv_heads, group = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    q_len, kv_len = draw(st.integers(0, 70)), draw(st.integers(0, 150))
    dim = draw(st.sampled_from([8, 16, 24, 40, 64, 72, 128, 256]))
    q, k, v = random_qkv(batch, kv_heads * group, kv_heads, q_len, kv_len, dim, dtype)
    if draw(st.booleans()):  # positions before heads in memory, as projections leave them
        q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    if draw(st.booleans()):  # last dimension not contiguous
        v = v.transpose(2, 3).contiguous().transpose(2, 3)
    spans = None
    if batch and draw(st.booleans()):
        rows = draw(st.sampled_from([1, batch]))
        spans = random_mask(rows, q_len, kv_len, draw(st.sampled_from([1, 2, 12]))).spans
    grad_lse = torch.randn(q.shape[:3]) if draw(st.booleans()) else None
    assert_right(q, k, v, spans, torch.randn_like(q), grad_lse)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 127, 129, 200])
def test_lengths_around_tile_borders(length):
    for mask in (
        SpanMask.causal(length),
        SpanMask.sliding_window(length, 9),
        SpanMask.block_causal(length, 8),
    ):
        q, k, v = random_qkv(q_len=length, dim=24)
        assert_right(q, k, v, mask.spans, torch.randn_like(q), torch.randn(q.shape[:3]))
    q, k, v = random_qkv(q_len=2 * length, heads=4, kv_heads=1)
    assert_right(q, k, v, SpanMask.block_diffusion(length, 4).spans, torch.randn_like(q), None)


@pytest.mark.parametrize("with_mask", [True, False])
def test_reference_passes_gradcheck(with_mask):
    spans = random_mask(2, 5, 7, 2).spans if with_mask else None
    inputs = [t.double().requires_grad_() for t in random_qkv(2, 4, 2, 5, 7, dim=3)]
    # lse of a blind row is -inf, which has no derivative.
    seen = torch.ones(2, 5).bool() if spans is None else reference.visible_keys(spans, 7).any(-1)

    def outputs(q, k, v):
        out, lse = reference.block_attention(q, k, v, spans, 0.5)
        return out, lse.transpose(0, 1)[:, seen]

    with_blind = outputs if bool(seen.all()) else lambda *qkv: [t.nan_to_num() for t in outputs(*qkv)]
    assert torch.autograd.gradcheck(with_blind, inputs)


def test_reference_backward_equals_its_autograd():
    q, k, v = (t.double() for t in random_qkv(2, 4, 2, 9, 12, dim=8))
    spans = random_mask(2, 9, 12, 2).spans
    out, lse = reference.block_attention(q, k, v, spans, 0.3)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = reference.block_attention_backward(grad_out, grad_lse, q, k, v, out, lse, spans, 0.3, chunk=4)
    exact = exact_gradients(q, k, v, spans, 0.3, grad_out, grad_lse)
    torch.testing.assert_close(list(grads), exact)


def test_what_no_query_sees_has_no_influence_and_no_gradient():
    q, k, v = random_qkv(batch=2, q_len=40)
    mask = SpanMask.block_diffusion(20, 4, lengths=torch.tensor([20, 13]))
    grad_out = torch.randn_like(q)
    expected = backward(q, k, v, mask.spans, 0.3, grad_out, None)
    hidden = ~mask.to_dense().any(1)
    k.transpose(1, 2)[hidden], v.transpose(1, 2)[hidden] = torch.nan, torch.nan
    grads = backward(q, k, v, mask.spans, 0.3, grad_out, None)
    assert all(map(torch.equal, grads, expected))
    assert (grads[1].transpose(1, 2)[hidden] == 0).all() and (grads[2].transpose(1, 2)[hidden] == 0).all()
    blind = ~mask.to_dense().any(2)
    assert (grads[0].transpose(1, 2)[blind] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [32, 40])
def test_bits_do_not_depend_on_threads_or_company(dim, dtype):
    """One thread takes one pass, several threads for one head take two: the sums have the same order."""
    q, k, v = random_qkv(heads=2, kv_heads=1, q_len=350, dim=dim, dtype=dtype)
    spans, grad_out = SpanMask.block_diffusion(175, 8).spans, torch.randn_like(q)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append(backward(q, k, v, spans, 0.3, grad_out, None))
    torch.set_num_threads(threads)
    for grads in results[1:]:
        assert all(map(torch.equal, grads, results[0]))
    pairs = [torch.cat([t, torch.randn_like(t)]) for t in (q, k, v, grad_out)]
    together = backward(*pairs[:3], spans, 0.3, pairs[3], None)
    assert all(torch.equal(grad[:1], alone) for grad, alone in zip(together, results[0], strict=True))


@pytest.mark.parametrize("needs_grad", [(True, True, True), (True, False, False), (False, False, True)])
def test_autograd_gives_gradients_where_they_are_needed(needs_grad):
    mask = SpanMask.block_diffusion(20, 4, lengths=torch.tensor([20, 11]))
    inputs = random_qkv(2, 4, 2, 40)
    ours = [t.clone().requires_grad_(need) for t, need in zip(inputs, needs_grad, strict=True)]
    out, lse = block_attention(*ours, mask, scale=0.3, return_lse=True)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    torch.autograd.backward([out, lse], [grad_out, grad_lse])
    exact = exact_gradients(*inputs, mask.spans, 0.3, grad_out, grad_lse)
    for mine, expected, need in zip(ours, exact, needs_grad, strict=True):
        assert (mine.grad is not None) == need
        if need:
            torch.testing.assert_close(mine.grad.double(), expected, rtol=1e-5, atol=1e-5)


def operator_cases():
    def call(q, k, v, spans, grad_out=None, grad_lse=True):
        out, lse = FORWARD(q, k, v, spans, 0.5)
        grad_out = torch.randn_like(q) if grad_out is None else grad_out
        return grad_out, torch.randn_like(lse) if grad_lse else None, q, k, v, out, lse, spans, 0.5

    plain, mask = random_qkv(2, 4, 2, 9, 12, dim=8), random_mask(2, 9, 12, 2).spans
    yield "contiguous", call(*plain, mask)
    yield "no mask, no gradient of lse", call(*plain, None, grad_lse=False)
    yield "transposed", call(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in plain), mask[:1])
    yield "column-major", call(*(t.transpose(2, 3).contiguous().transpose(2, 3) for t in plain), mask)
    yield "gradient of a sum", call(*plain, mask, grad_out=torch.ones(()).expand(plain[0].shape))
    yield "empty batch", call(*random_qkv(0, 4, 2, 9, dim=8), None)
    yield "bfloat16", call(*random_qkv(1, 2, 1, 9, dim=8, dtype=torch.bfloat16), None)


@pytest.mark.parametrize("case", list(operator_cases()), ids=lambda case: case[0])
def test_opcheck(case):
    opcheck(BACKWARD, case[1])


def test_compiles_once_for_all_lengths_and_masks():
    def attention(q, k, v, spans):
        return block_attention(q, k, v, SpanMask(spans, k.shape[2]), return_lse=True)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, (length, block_size) in enumerate([(12, 4), (12, 3), (20, 4)]):
        mask, inputs, results = SpanMask.block_diffusion(length, block_size), random_qkv(q_len=2 * length), []
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            for function in (compiled, attention):
                q, k, v = (t.clone().requires_grad_() for t in inputs)
                out, lse = function(q, k, v, mask.spans)
                results.append([out, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))])
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "position, value, text",
    [
        (0, torch.zeros(1, 2, 40, 8), r"grad_out.shape\[3\] must be 16 \(as in q\)"),
        (0, torch.zeros(1, 2, 40, 16).half(), "grad_out must have the dtype of q"),
        (1, torch.zeros(1, 2, 40).half(), "grad_lse must be float32, got float16"),
        (5, torch.zeros(1, 40, 16), "out must be .batch, heads, queries, head_dim."),
        (6, torch.zeros(1, 2, 39), r"lse.shape\[2\] must be 40"),
        (7, torch.tensor([0, 41], dtype=torch.int32).expand(1, 40, 1, 2), "0 <= start <= end <= 40"),
        (8, float("inf"), "scale must be finite"),
    ],
)
def test_bad_input_is_refused_by_name(position, value, text):
    q, k, v = random_qkv()
    out, lse = FORWARD(q, k, v, None, 0.3)
    call = [out, lse, q, k, v, out, lse, None, 0.3]
    call[position] = value
    with pytest.raises(ValueError, match=f"block_attention_backward: .*{text}"):
        BACKWARD(*call)
