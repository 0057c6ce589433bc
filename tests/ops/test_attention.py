"""block_attention on the CPU against its plain PyTorch reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dllm_kernels import SpanMask, block_attention
from dllm_kernels.ops import reference
from tests.ops.instruction_set_helpers import results_of_each

OP = torch.ops.dllm_kernels.block_attention.default
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def random_qkv(batch=1, heads=2, kv_heads=None, q_len=40, kv_len=None, dim=16, dtype=torch.float32):
    kv_heads, kv_len = kv_heads or heads, q_len if kv_len is None else kv_len
    shapes = (batch, heads, q_len, dim), *[(batch, kv_heads, kv_len, dim)] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes]


def random_mask(batch, q_len, kv_len, spans):
    """Spans of random width, some rows blind."""
    cuts = torch.randint(0, kv_len + 1, (batch, q_len, 2 * spans), dtype=torch.int32).sort(-1).values
    cuts[torch.rand(batch, q_len) < 0.1] = 0
    table = cuts.unflatten(-1, (spans, 2))
    # Empty spans are (0, 0) and stand last.
    empty = table[..., 0] == table[..., 1]
    table = table.masked_fill(empty[..., None], 0)
    order = empty.int().argsort(dim=-1, stable=True)
    return SpanMask(table.gather(2, order[..., None].expand_as(table)), kv_len)


def assert_close(q, k, v, mask):
    scale = q.shape[-1] ** -0.5
    out, lse = block_attention(q, k, v, mask, return_lse=True)
    exact, exact_lse = reference.block_attention(
        q.double(), k.double(), v.double(), None if mask is None else mask.spans, scale
    )
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    bound = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    blind = exact_lse == -torch.inf
    assert (lse[blind] == -torch.inf).all() and (out[blind] == 0).all()


@settings(max_examples=60)
@given(st.data())
def test_equals_the_reference_in_float64(data):
    draw = data.draw
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    batch, kv_heads, group = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 6))
    q_len, kv_len = draw(st.integers(0, 70)), draw(st.integers(0, 300))
    dim = 8 * draw(st.integers(1, 4)) if draw(st.booleans()) else draw(st.sampled_from([64, 128, 248, 256]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    q, k, v = random_qkv(batch, kv_heads * group, kv_heads, q_len, kv_len, dim, dtype)
    if draw(st.booleans()):  # positions before heads in memory, as projections leave them
        q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    if draw(st.booleans()):  # last dimension not contiguous
        v = v.transpose(2, 3).contiguous().transpose(2, 3)
    mask = random_mask(
        draw(st.sampled_from([1, batch])) or 1, q_len, kv_len, draw(st.sampled_from([1, 2, 3, 12]))
    )
    assert_close(q, k, v, mask if batch else None)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 127, 128, 129, 255, 256, 257])
def test_lengths_around_tile_borders(length):
    assert_close(*random_qkv(q_len=length, heads=3, kv_heads=1, dim=24), None)
    assert_close(*random_qkv(q_len=length), SpanMask.causal(length))
    assert_close(*random_qkv(q_len=2 * length), SpanMask.block_diffusion(length, 4))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scores_of_any_size_and_special_values(dtype):
    q, k, v = random_qkv(q_len=50, dtype=dtype)
    assert_close(q * 30, k * 30, v * 1e-5, SpanMask.sliding_window(50, 7))
    q[:, :, 3], v[:, :, 9] = torch.nan, torch.inf
    out = block_attention(q, k, v)
    assert out[:, :, 3].isnan().all() and (out[:, :, 4:] == torch.inf).all()


def test_what_no_query_sees_has_no_influence():

    q, k, v = random_qkv(batch=2, q_len=40)
    mask = SpanMask.block_diffusion(20, 4, lengths=torch.tensor([20, 13]))
    expected = block_attention(q, k, v, mask)
    hidden = ~mask.to_dense().any(1)
    k.transpose(1, 2)[hidden], v.transpose(1, 2)[hidden] = torch.nan, torch.nan
    assert torch.equal(block_attention(q, k, v, mask), expected)


def test_bits_do_not_depend_on_threads_or_company():
    q, k, v = random_qkv(batch=3, heads=4, kv_heads=2, q_len=200, dim=32)
    mask = SpanMask.block_causal(200, 8, lengths=torch.tensor([200, 77, 130]))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(block_attention(q, k, v, mask, return_lse=True))
    torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
    alone = block_attention(q[1:2], k[1:2], v[1:2], SpanMask(mask.spans[1:2], 200))
    assert torch.equal(alone[0], results[0][0][1])


ON_EACH = """
from dllm_kernels import SpanMask, block_attention
torch.manual_seed(1)
mask = SpanMask.block_diffusion(75, 8)
results = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    q, k, v = (torch.randn(2, heads, 150, 40).to(dtype).requires_grad_() for heads in (6, 2, 2))
    out, lse = block_attention(q, k, v, mask, return_lse=True)
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    results.append([out.detach(), lse.detach(), *grads])
"""


def test_every_instruction_set_of_this_machine_agrees(tmp_path):
    results = results_of_each(ON_EACH, tmp_path)
    for result in results.values():
        for mine, baseline in zip(result, results["baseline"], strict=True):
            for tensor, expected in zip(mine, baseline, strict=True):
                bound = TOLERANCE[tensor.dtype] * (1 + float(expected.abs().max()))
                torch.testing.assert_close(tensor, expected, rtol=0, atol=bound)


# ---- as a torch operator ---------------------------------------------------------------------------------
def operator_cases():
    plain = random_qkv(2, 4, 2, 9, 12, dim=8)
    mask = random_mask(2, 9, 12, 2).spans
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in plain]
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in plain]
    yield "contiguous", (*plain, mask, 0.5)
    yield "no mask", (*plain, None, 0.5)
    yield "transposed", (*transposed, mask[:1], 0.5)
    yield "column-major", (*columns, mask, 0.5)
    yield "empty batch", (*random_qkv(0, 4, 2, 9, dim=8), None, 0.5)
    yield "bfloat16", (*random_qkv(1, 2, 1, 9, dim=8, dtype=torch.bfloat16), None, 0.5)
    yield "all gradients", (*(t.clone().requires_grad_() for t in plain), mask, 0.5)
    yield "q gradient", (plain[0].clone().requires_grad_(), *plain[1:], mask, 0.5)


@pytest.mark.parametrize("case", list(operator_cases()), ids=lambda case: case[0])
def test_opcheck(case):
    opcheck(OP, case[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_mixed_dtypes(dtype):
    q, k, v = random_qkv()
    with torch.autocast("cpu", dtype):
        out = block_attention(q, k.to(dtype), v)
    assert out.dtype == dtype
    assert torch.equal(out, block_attention(q.to(dtype), k.to(dtype), v.to(dtype)))


# ---- bad input -------------------------------------------------------------------------------------------
Q, KV = torch.zeros(1, 4, 6, 16), torch.zeros(1, 2, 5, 16)
BAD_TENSORS = {
    "q must be .batch, heads, queries, head_dim.": (Q[0], KV, KV),
    "k must have the dtype of q .float32., got bfloat16": (Q, KV.bfloat16(), KV),
    "v must have the dtype of q": (Q, KV, KV.half()),
    "q must be float32 or bfloat16 or float16, got float64": (Q.double(), KV.double(), KV.double()),
    "q must be float32 or bfloat16 or float16, got int64": (Q.long(), KV.long(), KV.long()),
    r"k.shape\[0\] must be 1": (Q, KV.expand(2, 2, 5, 16), KV.expand(2, 2, 5, 16)),
    r"k.shape\[3\] must be 16": (Q, KV[..., :8], KV[..., :8]),
    r"v.shape\[2\] must be 5": (Q, KV, KV[:, :, :4]),
    r"multiple of k's heads \(3\), got 4": (Q, *[torch.zeros(1, 3, 5, 16)] * 2),
    "head_dim must be a multiple of 8 from 8 to 256, got 12": (Q[..., :12], KV[..., :12], KV[..., :12]),
    "head_dim must be a multiple of 8 from 8 to 256, got 264": [torch.zeros(1, 1, 2, 264)] * 3,
}


@pytest.mark.parametrize("text", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(text):
    q, k, v = BAD_TENSORS[text]
    with pytest.raises(ValueError, match=text):
        block_attention(q, k, v)
    with pytest.raises(ValueError, match=text):
        OP(q, k, v, None, 1.0)


@pytest.mark.parametrize(
    "spans, text",
    [
        (torch.zeros(1, 6, 1, 2), "spans must be int32, got float32"),
        (torch.zeros(1, 6, 2, dtype=torch.int32), r"spans must be \[1 or 1, 6, at least 1, 2\], got shape"),
        (torch.zeros(1, 5, 1, 2, dtype=torch.int32), "spans must be"),
        (torch.zeros(2, 6, 1, 2, dtype=torch.int32), "spans must be"),
        (torch.tensor([[[[0, 6]]] * 6], dtype=torch.int32), r"0 <= start <= end <= 5, got \[0, 6\]"),
        (torch.tensor([[[[-1, 3]]] * 6], dtype=torch.int32), r"got \[-1, 3\]"),
        (torch.tensor([[[[4, 3]]] * 6], dtype=torch.int32), r"got \[4, 3\]"),
        (torch.tensor([[[[2, 4], [1, 3]]] * 6], dtype=torch.int32), "at or after the end of the span before"),
    ],
)
def test_bad_spans_are_refused(spans, text):
    with pytest.raises(ValueError, match=text):
        OP(Q, KV, KV, spans, 1.0)


def test_bad_arguments_are_refused_in_python():
    with pytest.raises(TypeError, match=r"SpanMask\.from_dense"):
        block_attention(Q, KV, KV, torch.ones(6, 5).bool())
    with pytest.raises(TypeError, match="k must be a Tensor, got list"):
        block_attention(Q, [1.0], KV)
    with pytest.raises(ValueError, match=r"mask\.kv_len must be the number of keys"):
        block_attention(Q, KV, KV, SpanMask.full(6, 7))
    with pytest.raises(ValueError, match="spans must be"):
        block_attention(Q, KV, KV, SpanMask.full(7, 5))
    with pytest.raises(ValueError, match="scale must be finite"):
        block_attention(Q, KV, KV, scale=float("nan"))
