"""cached_block_attention on CUDA against the float32 reference and the CPU operator."""

import pytest
import torch

from dllm_kernels import cached_attention_plan, cached_block_attention
from dllm_kernels.ops import attention, reference
from simt import placement

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
SPLIT = 4 * 32  # keys from which on one more CTA shares them
hardware = pytest.mark.hardware


def random_call(
    batch=1, kv_heads=1, group=1, length=8, dim=64, page_size=32, pages=2, dtype=torch.bfloat16, seed=0
):
    """q, k, v, cache_k, cache_v, page_table: sequences own their pages, in random order."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(dtype)

    total = batch * pages + 2
    return (
        normal(batch, kv_heads * group, length, dim),
        *(normal(batch, kv_heads, length, dim) for _ in "kv"),
        *(normal(total, page_size, kv_heads, dim) for _ in "kv"),
        torch.randperm(total, generator=draw)[: batch * pages].view(batch, pages).int(),
    )


def spans_of(*rows):
    """int32 [B, Tq, R, 2] of nested lists: the spans of every query of every sequence."""
    return torch.tensor(rows, dtype=torch.int32)


def random_spans(batch, rows, high, count):
    cuts = torch.randint(0, high + 1, (batch, rows, 2 * count), dtype=torch.int32)
    return cuts.sort(-1).values.unflatten(-1, (count, 2))


def poison_unseen(call, cache_spans, fresh_spans, q_lengths):
    """NaN wherever no live query looks: slots, fresh keys, rows beyond a length."""
    q, k, v, cache_k, cache_v, table = call
    length, page_size = q.shape[2], cache_k.shape[1]
    live = torch.ones(len(q), length, dtype=torch.bool)
    if q_lengths is not None:
        live = torch.arange(length) < q_lengths[:, None]
    shown = reference.visible_keys(cache_spans, table.shape[1] * page_size).expand(len(q), length, -1)
    seen = torch.zeros(cache_k.shape[:2], dtype=torch.bool)
    for b, position in (shown & live[..., None]).any(1).nonzero().tolist():
        seen[table[b, position // page_size], position % page_size] = True
    cache_k[~seen], cache_v[~seen] = torch.nan, torch.nan
    fresh = (
        live
        if fresh_spans is None
        else (reference.visible_keys(fresh_spans, length) & live[..., None]).any(1)
    )
    for tensor in (k, v):
        tensor.transpose(1, 2)[~(fresh & live)] = torch.nan
    q.transpose(1, 2)[~live] = torch.nan


def assert_right(gpu, call, cache_spans, fresh_spans=None, q_lengths=None, scale=None):
    """Within twice the error of PyTorch in the same dtype, plus a rounding floor; what is unseen is NaN."""
    poison_unseen(call, cache_spans, fresh_spans, q_lengths)
    options = dict(fresh_spans=fresh_spans, q_lengths=q_lengths, scale=scale)
    out, lse = gpu(cached_block_attention, *call, cache_spans, **options, return_lse=True)

    scale = call[0].shape[-1] ** -0.5 if scale is None else scale
    finite = [t.nan_to_num() for t in call[:5]]
    masks = call[5], cache_spans, fresh_spans, q_lengths, scale
    exact, exact_lse = reference.cached_block_attention(*(t.float() for t in finite), *masks)
    rounded, _ = reference.cached_block_attention(*finite, *masks)
    dtype = out.dtype
    if out.numel():
        error, allowed = ((x.float() - exact).abs().max() for x in (out, rounded))
        assert error <= 2 * allowed + FLOOR[dtype]
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-4)
    on_cpu = cached_block_attention(*call, cache_spans, **options)
    torch.testing.assert_close(out, on_cpu, rtol=FLOOR[dtype], atol=FLOOR[dtype])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "cached", [0, 1, 31, 32, 33, 64, SPLIT, 2 * SPLIT - 33, 2 * SPLIT - 32, 2 * SPLIT + 5]
)
def test_lengths_around_tile_page_and_split_borders(gpu, cached, dtype):
    call = random_call(length=3, page_size=16, pages=-(-2 * SPLIT // 16) + 1, dtype=dtype)
    assert_right(gpu, call, spans_of([[[0, cached]]]))


@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_hopper_each_launch_overlaps_the_one_before_it(gpu, dtype):
    call = random_call(length=3, page_size=16, pages=20, dtype=dtype)
    assert_right(gpu, call, spans_of([[[0, 2 * SPLIT + 5]]]))


@pytest.mark.parametrize("page_size", [1, 7, 32, 48])
def test_two_spans_over_pages_of_any_size(gpu, page_size):
    call = random_call(batch=2, group=2, length=5, page_size=page_size, pages=-(-400 // page_size))
    assert_right(gpu, call, spans_of([[[0, 100], [131, 390]]], [[[3, 3], [200, 211]]]))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("group", [1, 3])
def test_queries_around_the_borders_of_row_tiles(gpu, length, group):
    call = random_call(kv_heads=2 // (length // 33 + 1), group=group, length=length, pages=3)
    assert_right(gpu, call, spans_of([[[0, 70]]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 72, 128, 200, 256])
def test_every_dtype_and_head_dim(gpu, dim, dtype):
    call = random_call(kv_heads=2, group=2, length=4, dim=dim, pages=13, dtype=dtype)
    assert_right(gpu, call, spans_of([[[0, 400]]]))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_many_rows(gpu, dim):
    """More rows than one small tile, so that the large one is taken, and its last warps have none."""
    call = random_call(group=5, length=20, dim=dim, pages=14)
    assert_right(gpu, call, spans_of([[[0, 130], [200, 440]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length, count", [(6, 2), (40, 1), (6, 9)])
def test_spans_of_every_query_and_lengths(gpu, length, count, dtype):
    batch = 4
    call = random_call(batch, 2, 2, length, pages=8, dtype=dtype)
    lengths = torch.tensor([length, 1, 0, length // 2], dtype=torch.int32)
    for rows in (1, length):
        spans = random_spans(batch, rows, 256, count), random_spans(batch, length, length, 2)
        out = assert_right(gpu, random_call(batch, 2, 2, length, pages=8, dtype=dtype), *spans, lengths)
        assert (out[1, :, 1:] == 0).all() and (out[2] == 0).all()
    assert_right(gpu, call, random_spans(batch, 1, 256, count), None, lengths, scale=-0.3)


def test_empty_and_blind(gpu):
    assert_right(gpu, random_call(batch=0), torch.zeros(0, 1, 1, 2, dtype=torch.int32))
    assert_right(gpu, random_call(length=0), spans_of([[[0, 5]]]))
    assert_right(gpu, random_call(pages=0), spans_of([[[0, 0]]]))
    assert_right(gpu, random_call(pages=14), spans_of([[[0, 0], [5, 5]]]))
    blind = torch.zeros(1, 8, 1, 2, dtype=torch.int32)
    out, lse = gpu(
        cached_block_attention,
        *random_call(pages=14),
        spans_of([[[0, 0]]]),
        fresh_spans=blind,
        return_lse=True,
    )
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company(gpu, dtype):
    """Alone, beside longer and shorter rows, with more pages and in longer batches of queries."""
    short, length = 5, 40
    call = random_call(3, 2, 2, length, pages=20, dtype=dtype)
    spans, lengths = random_spans(3, length, 640, 2), torch.tensor([length, short, 17], dtype=torch.int32)
    spans[1, :short] = torch.tensor([[3, 101], [130, 577]])
    fresh = random_spans(3, length, length, 2).clamp(max=short)
    together = gpu(cached_block_attention, *call, spans, fresh_spans=fresh, q_lengths=lengths)

    q, k, v, *cache, table = call
    alone = [t[1:2, :, :short] for t in (q, k, v)]
    options = dict(fresh_spans=fresh[1:2, :short])
    assert torch.equal(
        gpu(cached_block_attention, *alone, *cache, table[1:2], spans[1:2, :short], **options),
        together[1:2, :, :short],
    )
    fewer_pages = table[1:2, :19]
    one_row_of_spans = spans[1:2, :1]
    assert torch.equal(
        gpu(cached_block_attention, *alone, *cache, fewer_pages, one_row_of_spans, **options),
        together[1:2, :, :short],
    )


def test_splits_follow_a_row_s_own_length(gpu):
    """The whole batch, or all queries instead of the live ones, would leave room for fewer splits."""
    *tensors, cache_k, cache_v, table = random_call(4, 32, 1, 97, pages=20)
    spans = spans_of(*[[[[0, 640]]]] * 4)
    lengths = torch.tensor([0, 5, 0, 0], dtype=torch.int32)
    together = gpu(cached_block_attention, *tensors, cache_k, cache_v, table, spans, q_lengths=lengths)
    short = [t[1:2, :, :5] for t in tensors]
    alone = gpu(cached_block_attention, *short, cache_k, cache_v, table[1:2], spans[1:2])
    assert torch.equal(together[1:2, :, :5], alone)


def test_pages_spans_and_lengths_out_of_range_are_cut(gpu):
    call = random_call(batch=2, length=4, pages=3)
    q, k, v, *cache, table = call
    table[0] = torch.tensor([-7, 100, 2])
    spans = spans_of([[[-5, 2000]]], [[[0, 50]]])
    out = gpu(cached_block_attention, q, k, v, *cache, table, spans, q_lengths=torch.tensor([99, -1]).int())
    table[0] = torch.tensor([0, len(cache[0]) - 1, 2])
    spans = spans_of([[[0, 96]]], [[[0, 50]]])
    lengths = torch.tensor([4, 0]).int()
    assert torch.equal(out, gpu(cached_block_attention, q, k, v, *cache, table, spans, q_lengths=lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_and_alignment(gpu, dtype):
    q, k, v, *cache, table = random_call(2, 2, 2, 6, dim=24, dtype=dtype)
    spans = spans_of([[[0, 40]]], [[[0, 64]]])
    expected = gpu(cached_block_attention, q, k, v, *cache, table, spans)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    columns = k.transpose(2, 3).contiguous().transpose(2, 3)
    shifted = torch.empty(v.numel() + 1, dtype=dtype)[1:].view(v.shape).copy_(v)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in cache]
    got = gpu(
        cached_block_attention, transposed, columns, shifted, *heads_first, table.T.contiguous().T, spans
    )
    assert torch.equal(got, expected)
    odd = torch.empty(cache[0].numel() + 1, dtype=dtype)[1:].view(cache[0].shape)
    with pytest.raises(ValueError, match="cache_k must start every row of a head at a multiple of 16 bytes"):
        gpu(cached_block_attention, q, k, v, odd, cache[1], table, spans)


@pytest.mark.parametrize("cached, repeats", [(500, 2), pytest.param(4000, 20, marks=hardware)])
def test_repeats_have_the_same_bits(gpu, cached, repeats):
    call = random_call(2, 2, 2, 8, dim=128, pages=-(-cached // 32))
    spans = spans_of([[[0, cached]]], [[[0, cached // 3]]])
    first = gpu(cached_block_attention, *call, spans)
    assert all(torch.equal(gpu(cached_block_attention, *call, spans), first) for _ in range(repeats))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 200])
@pytest.mark.parametrize("group, length", [(1, 5), (3, 40)])
def test_the_cta_that_merges_splits_changes_no_bit(gpu, group, length, dim, dtype):
    """It is the one that finishes last, which on the emulator follows from the order of CTAs."""
    call = random_call(3, 2, group, length, dim=dim, pages=20, dtype=dtype)
    lengths = torch.tensor([length, 0, max(length - 36, 1)], dtype=torch.int32)
    places = [placement.OnEmulator(order) for order in range(5)] if gpu.emulated else [gpu] * 20
    spans = random_spans(3, 1, 640, 2)
    spans[0] = torch.tensor([[0, 300], [311, 640]])
    first, *others = (
        place(cached_block_attention, *call, spans, q_lengths=lengths, return_lse=True) for place in places
    )
    for out, lse in others:
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1])
    rounded, _ = reference.cached_block_attention(*call, spans, None, lengths, dim**-0.5)
    torch.testing.assert_close(first[0], rounded, rtol=2 * FLOOR[dtype], atol=2 * FLOOR[dtype])


# ---- plans
def planned_call(length=9, dtype=torch.bfloat16, seed=0):
    """A call of three rows, one of them empty, and the arguments of its plan."""
    call = random_call(3, 2, 2, length, dim=64, pages=20, dtype=dtype, seed=seed)
    q, k, _, cache_k, _, table = call
    options = dict(q_lengths=torch.tensor([length, 0, length // 2], dtype=torch.int32))
    spans = spans_of([[[0, 300], [311, 640]]], [[[0, 9], [9, 9]]], [[[63, 95], [200, 490]]])
    return (*call, spans), options, (q, k, cache_k, table, spans, options["q_lengths"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_serves_call_after_call(gpu, dtype):
    call, options, sizes = planned_call(dtype=dtype)
    expected = gpu(cached_block_attention, *call, **options)
    plan = gpu(cached_attention_plan, *sizes)
    before = plan.clone()
    for _ in range(3):
        assert torch.equal(gpu(cached_block_attention, *call, **options, plan=plan), expected)
        assert torch.equal(plan, before)


def test_a_plan_holds_live_queries_and_the_tiles_that_they_see(gpu):
    """Tiles of 32 keys: from the first to the last cached key, whatever lies between; then counters."""
    *_, sizes = planned_call()
    plan = gpu(cached_attention_plan, *sizes)
    assert plan[:12].view(3, 4)[:, :3].tolist() == [[9, 0, 20], [0, 0, 0], [4, 32, 15]]
    assert (plan[12:] == 0).all()


@pytest.mark.parametrize("length, group", [(1, 1), (9, 2), (33, 3)])
def test_compilers_know_the_size_of_a_plan(gpu, length, group):
    call = random_call(2, 3, group, length)
    q, k, _, cache_k, _, table = call
    plan = gpu(cached_attention_plan, q, k, cache_k, table, spans_of([[[0, 5]]], [[[0, 9]]]))
    assert len(plan) == attention._plan_size(q.shape, 3)


@pytest.mark.parametrize("seed", range(6))
def test_with_any_plan_a_call_stays_within_its_tensors(gpu, seed):
    """A wrong one gives wrong results. On the emulator a kernel that leaves its tensors fails."""
    call, options, sizes = planned_call(seed=seed)
    draw = torch.Generator().manual_seed(seed)
    size = gpu(cached_attention_plan, *sizes).shape
    plan = torch.randint(-(2**31), 2**31 - 1, size, generator=draw, dtype=torch.int64).int()
    if seed % 2:
        plan = torch.randint(-9, 700, size, generator=draw).int()
    out = gpu(cached_block_attention, *call, **(options if seed % 3 else {}), plan=plan)
    assert out.shape == call[0].shape


def test_a_plan_of_other_sizes_is_refused(gpu):
    call, options, sizes = planned_call()
    plan = gpu(cached_attention_plan, *sizes)
    with pytest.raises(ValueError, match="plan must be what cached_attention_plan returns for these tensors"):
        gpu(cached_block_attention, *call, **options, plan=plan[1:])


@pytest.mark.parametrize(
    "kv_heads, group, length",
    [
        pytest.param(*shape, marks=hardware)
        for shape in [(32, 1, 32), (8, 4, 32), (4, 8, 64), (2, 6, 256), (1, 1, 1)]
    ],
)
def test_shapes_of_models(gpu, kv_heads, group, length):
    call = random_call(2, kv_heads, group, length, 128, pages=128)
    assert_right(gpu, call, spans_of([[[0, 1200], [1232, 4000]]], [[[0, 700], [700, 700]]]))


# ---- on a GPU only ------------------------------------------------------------------------------------
def on_gpu(*tensors):
    return [t.cuda() for t in tensors]


@pytest.mark.graph
def test_graph_replay_follows_lengths_spans_and_pages():
    call, spans = on_gpu(*random_call(2, 2, 2, 8, pages=20)), spans_of([[[0, 600]]], [[[0, 5]]]).cuda()
    lengths = torch.tensor([8, 3], dtype=torch.int32).cuda()

    def layers():
        """Two that share a plan, and one with its own."""
        q, k, _, cache_k, _, table = call
        plan = cached_attention_plan(q, k, cache_k, table, spans, lengths)
        shared = [cached_block_attention(*call, spans, q_lengths=lengths, plan=plan) for _ in range(2)]
        return *shared, cached_block_attention(*call, spans, q_lengths=lengths)

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = layers()
    spans.copy_(spans_of([[[0, 33]]], [[[10, 640]]]))
    lengths.copy_(torch.tensor([1, 8]))
    call[5].copy_(call[5].flip(0))
    expected = cached_block_attention(*call, spans, q_lengths=lengths)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(out, expected) for out in outs)


def test_runs_on_the_current_stream():
    call, spans = on_gpu(*random_call(2, 2, 2, 8, pages=20)), spans_of([[[0, 600]]], [[[0, 5]]]).cuda()
    expected = cached_block_attention(call[0] * 2, *call[1:], spans)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # work on another stream would read q before it is doubled
        out = cached_block_attention(call[0].mul_(2), *call[1:], spans)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_opcheck():
    call, spans = on_gpu(*random_call(2, 2, 2, 8)), spans_of([[[0, 60]]], [[[0, 5]]]).cuda()
    torch.library.opcheck(
        torch.ops.dllm_kernels.cached_block_attention.default, (*call, spans, None, None, 0.5)
    )
    q, k, _, cache_k, _, table = call
    sizes = q, k, cache_k, table, spans, None
    torch.library.opcheck(torch.ops.dllm_kernels.cached_attention_plan.default, sizes)


def test_tensors_on_two_devices_are_refused():
    call, spans = random_call(), spans_of([[[0, 60]]])
    with pytest.raises(ValueError, match=r"cache_spans must be on the device of q \(cuda:0\), got cpu"):
        cached_block_attention(*on_gpu(*call), spans)
