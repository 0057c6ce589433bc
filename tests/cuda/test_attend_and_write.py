"""attend_and_write_ on CUDA: the bits of rotate_half, cached_block_attention and kv_write_ one after the
other, from one kernel where it takes them all."""

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.ops import reference
from simt import placement

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def random_call(
    length=9, group=2, dim=64, dtype=torch.bfloat16, kv_heads=2, lengths=None, angles=3, seed=0, page_size=16
):
    """Keywords of a call of three rows that see positions 0 to 500 and write from 512 on."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(dtype)

    batch, pages = 3, -(-(512 + length) // page_size)
    total = batch * pages + 2
    phase = 9 * torch.rand(angles, length, dim // 2, generator=draw).repeat(1, 1, 2)
    positions = 512 + torch.arange(length).repeat(batch, 1)
    positions[torch.rand(positions.shape, generator=draw) < 0.3] = -1
    return dict(
        q=normal(batch, kv_heads * group, length, dim),
        k=normal(batch, kv_heads, length, dim),
        v=normal(batch, kv_heads, length, dim),
        cache_k=normal(total, page_size, kv_heads, dim),
        cache_v=normal(total, page_size, kv_heads, dim),
        page_table=torch.randperm(total, generator=draw)[: batch * pages].view(batch, pages).int(),
        cache_spans=torch.tensor([[[[0, 500]]], [[[31, 97]]], [[[0, 0]]]], dtype=torch.int32),
        cos=phase.cos().to(dtype),
        sin=phase.sin().to(dtype),
        positions=positions.int(),
        q_lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
    )


def chain(q, k, v, cache_k, cache_v, page_table, cache_spans, cos, sin, positions, **options):
    """What one call stands for."""
    if cos is not None:
        q, k = dk.rotate_half(q, k, cos, sin)
    out = dk.cached_block_attention(q, k, v, cache_k, cache_v, page_table, cache_spans, **options)
    if positions is not None:
        dk.kv_write_(cache_k, cache_v, k, v, page_table, positions)
    return out


def copied(call):
    return {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)
        if isinstance(t, torch.Tensor)
        else t
        for name, t in call.items()
    }


def assert_same_bits(gpu, call):
    expected = copied(call)
    out, chained = gpu(dk.attend_and_write_, **call), gpu(chain, **expected)
    assert torch.equal(out, chained)
    for name in ("cache_k", "cache_v"):
        assert torch.equal(call[name], expected[name])
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128, 256])
def test_every_dtype_and_head_dim(gpu, dim, dtype):
    """Halves of 24 are no whole accesses: then, and in float32, it is several kernels."""
    assert_same_bits(gpu, random_call(dim=dim, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("length, group", [(1, 1), (31, 1), (32, 3), (33, 1), (70, 1), (47, 5)])
def test_queries_and_keys_around_the_borders_of_tiles(gpu, length, group, dtype):
    assert_same_bits(gpu, random_call(length, group, dtype=dtype, kv_heads=1))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lengths", [[9, 0, 4], [0, 0, 0], [1, 9, 9]])
def test_tokens_beyond_a_length_are_written_and_not_seen(gpu, lengths, dim):
    assert_same_bits(gpu, random_call(lengths=lengths, dim=dim))


@pytest.mark.parametrize("group, length", [(1, 40), (4, 20)])
def test_fresh_keys_that_some_queries_see(gpu, group, length):
    call = random_call(length, group)
    start = torch.arange(length).clamp(min=5)[:, None] - 5
    spans = torch.stack([start, start + 6], dim=-1).int()
    assert_same_bits(gpu, call | dict(fresh_spans=spans[None].expand(3, -1, -1, -1).contiguous()))
    blind = torch.zeros(3, length, 1, 2, dtype=torch.int32)
    assert_same_bits(gpu, random_call(length, group) | dict(fresh_spans=blind))


@pytest.mark.parametrize("left_out", [("cos", "sin"), ("positions",), ("cos", "sin", "positions")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_given_is_not_done(gpu, left_out, dtype):
    call = random_call(dtype=dtype)
    before = call["cache_k"].clone()
    assert_same_bits(gpu, call | dict.fromkeys(left_out))
    assert torch.equal(call["cache_k"], before) == ("positions" in left_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_angles_of_one_sequence_for_all_and_any_strides(gpu, dtype):
    call = random_call(angles=1, dtype=dtype)
    call["q"] = call["q"].transpose(1, 2).contiguous().transpose(1, 2)
    call["k"] = call["k"].transpose(2, 3).contiguous().transpose(2, 3)
    call["cos"] = (
        torch.empty(call["cos"].numel() + 1, dtype=dtype)[1:].view(call["cos"].shape).copy_(call["cos"])
    )
    call["cache_v"] = call["cache_v"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits(gpu, call)


@pytest.mark.parametrize("length", [5, 70])
def test_the_later_token_stays(gpu, length):
    call = random_call(length)
    call["positions"] = torch.full((3, length), 515, dtype=torch.int32)
    call["positions"][:, -1] = -1
    assert_same_bits(gpu, call)
    _, key = reference.rotate_half(call["q"], call["k"], call["cos"], call["sin"])
    page = call["page_table"][:, 515 // 16].long()
    assert torch.equal(call["cache_k"][page, 515 % 16], key[:, :, -2])
    assert torch.equal(call["cache_v"][page, 515 % 16], call["v"][:, :, -2])


def test_pages_and_positions_out_of_range_are_skipped(gpu):
    call = random_call()
    call["positions"][0] = torch.tensor([-1, -2, 2**31 - 1, -(2**31), 10_000, 512, 513, 514, 515])
    call["page_table"][1, 32] = 2**31 - 1
    call["page_table"][2, 32] = -5
    assert_same_bits(gpu, call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length, group", [(9, 2), (40, 3)])
def test_the_order_of_ctas_changes_no_bit(gpu, length, group, dtype):
    places = [placement.OnEmulator(order) for order in range(5)] if gpu.emulated else [gpu] * 20
    results = []
    for place in places:
        call = random_call(length, group, dtype=dtype, lengths=[length, 0, 3])
        results.append((place(dk.attend_and_write_, **call), call["cache_k"], call["cache_v"]))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_hopper_the_launch_overlaps_the_one_before_it(gpu, dtype):
    assert_same_bits(gpu, random_call(dtype=dtype))


def test_layers_share_a_plan(gpu):
    call = random_call(lengths=[9, 0, 4])
    names = "q", "k", "cache_k", "page_table", "cache_spans", "q_lengths"
    plan = gpu(dk.cached_attention_plan, *(call[name] for name in names))
    before = plan.clone()
    for _ in range(2):
        assert_same_bits(gpu, call | dict(plan=plan))
        assert torch.equal(plan, before)


# ---- on a GPU only ------------------------------------------------------------------------------------
def on_gpu(call):
    return {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in call.items()}


@pytest.mark.graph
def test_graph_replay_follows_positions_and_lengths():
    call, chained = on_gpu(random_call(lengths=[9, 0, 4])), on_gpu(random_call(lengths=[9, 0, 4]))
    dk.attend_and_write_(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dk.attend_and_write_(**call)
    for tensors in (call, chained):
        tensors["positions"].copy_(tensors["positions"].flip(1))
        tensors["q_lengths"].copy_(torch.tensor([3, 9, 1]))
    chained["cache_k"].copy_(call["cache_k"])
    chained["cache_v"].copy_(call["cache_v"])
    for _ in range(2):
        graph.replay()
        assert torch.equal(out, chain(**chained))
        assert torch.equal(call["cache_k"], chained["cache_k"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    call = on_gpu(random_call(dtype=dtype))
    ordered = [call.pop(name) for name in list(call)[:7]]
    cos, sin, positions, lengths = call.values()
    arguments = (*ordered, cos, sin, positions, None, lengths, 0.5)
    torch.library.opcheck(torch.ops.dllm_kernels.attend_and_write_.default, arguments)
