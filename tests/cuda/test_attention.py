"""block_attention on CUDA against the float32 reference and the CPU operator."""

import threading

import pytest
import torch

from dllm_kernels import SpanMask, block_attention
from dllm_kernels.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
MASKS = {
    "none": lambda length: None,
    "causal": lambda length: SpanMask.causal(length),
    "window": lambda length: SpanMask.sliding_window(length, 9),
    "block_diffusion": lambda length: SpanMask.block_diffusion(length // 2, 4) if length % 2 == 0 else None,
    "many spans": lambda length: SpanMask.from_dense(torch.arange(length).expand(length, length) % 4 < 2),
}


hardware = pytest.mark.hardware


def random_qkv(batch, heads, kv_heads, q_len, kv_len, dim, dtype):
    shapes = (batch, heads, q_len, dim), *[(batch, kv_heads, kv_len, dim)] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes]


def assert_right(gpu, q, k, v, mask):
    """Within twice the error that the same dtype costs in PyTorch, plus a rounding floor."""
    scale = q.shape[-1] ** -0.5
    spans = None if mask is None else mask.spans
    out, lse = gpu(block_attention, q, k, v, mask, return_lse=True)
    exact, exact_lse = reference.block_attention(q.float(), k.float(), v.float(), spans, scale)
    rounded, _ = reference.block_attention(q, k, v, spans, scale)
    error = (out.float() - exact).abs().max() if out.numel() else torch.tensor(0.0)
    allowed = 2 * (rounded.float() - exact).abs().max() if out.numel() else torch.tensor(0.0)
    assert error <= allowed + FLOOR[q.dtype]
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-4)
    on_cpu = block_attention(q, k, v, mask)
    torch.testing.assert_close(out, on_cpu, rtol=FLOOR[q.dtype], atol=FLOOR[q.dtype])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100, pytest.param(257, marks=hardware)])
def test_lengths_around_tile_borders(gpu, length, mask):
    assert_right(gpu, *random_qkv(2, 2, 2, length, length, 64, torch.float32), MASKS[mask](length))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 130, 200, pytest.param(1025, marks=hardware)])
def test_lengths_around_tile_borders_of_tensor_cores(gpu, length, mask):
    assert_right(gpu, *random_qkv(1, 2, 1, length, length, 64, torch.bfloat16), MASKS[mask](length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 72, 128, 200, 256])
def test_every_dtype_and_head_dim_with_grouped_queries(gpu, dim, dtype):
    mask = SpanMask.block_diffusion(20, 8, lengths=torch.tensor([20, 9]))
    assert_right(gpu, *random_qkv(2, 4, 2, 40, 40, dim, dtype), mask)
    assert_right(gpu, *random_qkv(1, 3, 1, 19, 70, dim, dtype), None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_and_blind(gpu, dtype):
    assert_right(gpu, *random_qkv(0, 2, 2, 8, 8, 16, dtype), None)
    assert_right(gpu, *random_qkv(1, 2, 2, 8, 0, 16, dtype), None)
    blind = SpanMask(torch.zeros(1, 40, 2, 2, dtype=torch.int32), 40)
    out, lse = gpu(block_attention, *random_qkv(1, 2, 2, 40, 40, 16, dtype), blind, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def assert_close_to_exact(gpu, q, k, v, scale):
    """For scores of any size: their float32 rounding changes the weights by as much."""
    exact, exact_lse = reference.block_attention(q.double(), k.double(), v.double(), None, scale)
    out, lse = gpu(block_attention, q, k, v, scale=scale, return_lse=True)
    rounding = 1e-6 * abs(scale) * float((q.double() @ k.double().transpose(-1, -2)).abs().max())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=3 * FLOOR[q.dtype] + rounding)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-42, 4.0])
def test_any_scale(gpu, scale, dtype):
    q, k, v = random_qkv(1, 2, 1, 70, 150, 64, dtype)
    assert_close_to_exact(gpu, q, k, v, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0.5, 3.0, -3.0])
def test_scores_that_grow_or_shrink_from_key_to_key(gpu, step, dtype):
    """The largest score moves from tile to tile, by less or more than the shift is allowed to lag behind."""
    q, k, v = random_qkv(1, 1, 1, 40, 300, 64, dtype)
    q[..., 0] = 1.0
    k[..., 0] = (step * torch.arange(300)).to(dtype)
    assert_close_to_exact(gpu, q, k, v, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_alignment(gpu, dtype):
    q, k, v = random_qkv(2, 2, 2, 50, 50, 32, dtype)
    expected = gpu(block_attention, q, k, v)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    columns = k.transpose(2, 3).contiguous().transpose(2, 3)
    shifted = torch.empty(v.numel() + 1, dtype=dtype)[1:].view(v.shape).copy_(v)
    assert torch.equal(gpu(block_attention, transposed, columns, shifted), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_query_sees_has_no_influence(gpu, dtype):
    q, k, v = random_qkv(2, 2, 2, 160, 160, 16, dtype)
    mask = SpanMask.block_diffusion(80, 4, lengths=torch.tensor([80, 53]))
    expected = gpu(block_attention, q, k, v, mask)
    hidden = ~mask.to_dense().any(1)
    k.transpose(1, 2)[hidden], v.transpose(1, 2)[hidden] = torch.nan, torch.nan
    assert torch.equal(gpu(block_attention, q, k, v, mask), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_that_only_some_queries_of_a_tile_see_may_hold_anything_elsewhere(gpu, dtype):
    """Queries of other tiles see a key; those of this one do not: its values never meet their weights."""
    q, k, v = random_qkv(1, 1, 1, 160, 160, 64, dtype)
    visible = torch.ones(160, 160, dtype=torch.bool)
    visible[:128, 70:75] = False
    mask = SpanMask.from_dense(visible)
    expected = gpu(block_attention, q, k, v, mask)
    k[..., 72, :], v[..., 72, :] = torch.nan, torch.inf
    out = gpu(block_attention, q, k, v, mask)
    assert torch.equal(out[..., :128, :], expected[..., :128, :]) and out[..., 128:, :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_spans_beyond_the_keys_are_cut(gpu, dtype):
    q, k, v = random_qkv(1, 2, 2, 40, 40, 16, dtype)
    spans = torch.tensor([-5, 1000], dtype=torch.int32).expand(1, 40, 1, 2)
    out, _ = gpu(torch.ops.dllm_kernels.block_attention, q, k, v, spans, 0.25)
    assert torch.equal(out, gpu(block_attention, q, k, v))
    nothing = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32).expand(1, 40, 1, 2)
    out, _ = gpu(torch.ops.dllm_kernels.block_attention, q, k, v, nothing, 0.25)
    assert (out == 0).all()


@pytest.mark.parametrize("length, repeats", [(70, 2), pytest.param(300, 20, marks=hardware)])
def test_repeats_have_the_same_bits(gpu, length, repeats):
    q, k, v = random_qkv(2, 4, 2, length, length, 128, torch.bfloat16)
    mask = SpanMask.block_causal(length, 32, lengths=torch.tensor([length, length // 3]))
    first = gpu(block_attention, q, k, v, mask)
    assert all(torch.equal(gpu(block_attention, q, k, v, mask), first) for _ in range(repeats))


# ---- on a GPU only ------------------------------------------------------------------------------------
def on_gpu(*tensors):
    return [t.cuda() for t in tensors]


def test_runs_on_the_current_stream():
    q, k, v = on_gpu(*random_qkv(1, 8, 8, 512, 512, 64, torch.float32))
    expected = block_attention(q * 2, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # work on another stream would read q before it is doubled
        out = block_attention(q.mul_(2), k, v)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_a_thread_that_has_launched_nothing():
    """The driver knows no context there when the first kernel is launched."""
    (q,) = on_gpu(torch.randn(1, 2, 130, 64).bfloat16())
    mask = SpanMask.causal(130).to("cuda")
    results = [block_attention(q, q, q, mask)]
    thread = threading.Thread(target=lambda: results.append(block_attention(q, q, q, mask)))
    thread.start()
    thread.join()
    assert torch.equal(*results)


@pytest.mark.graph
def test_graph_replay_follows_its_inputs():
    q, k, v = on_gpu(*random_qkv(1, 4, 2, 64, 64, 64, torch.bfloat16))
    spans = SpanMask.causal(64).spans.to("cuda")
    mask = SpanMask.causal(64).to("cuda")
    object.__setattr__(mask, "spans", spans)
    block_attention(q, k, v, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_attention(q, k, v, mask)
    q.copy_(torch.randn_like(q))
    spans.copy_(SpanMask.block_causal(64, 16).spans)
    graph.replay()
    assert torch.equal(out, block_attention(q, k, v, SpanMask.block_causal(64, 16).to("cuda")))


def test_tensors_on_two_devices_are_refused():
    q, k, v = on_gpu(*random_qkv(1, 2, 2, 8, 8, 16, torch.float32))
    with pytest.raises(ValueError, match=r"k must be on the device of q \(cuda:0\), got cpu"):
        block_attention(q, k.cpu(), v)
    with pytest.raises(ValueError, match="spans must be on the device of q"):
        block_attention(q, k, v, SpanMask.causal(8))
