"""kv_write_ on CUDA against its plain PyTorch reference."""

import pytest
import torch

from dllm_kernels import kv_write_
from dllm_kernels.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_call(batch=2, heads=3, tokens=5, dim=8, page_size=4, pages=3, dtype=torch.bfloat16):
    """cache_k, cache_v, k, v, page_table, positions: distinct positions, some skipped."""
    total = batch * pages + 1
    caches = [torch.randn(total, page_size, heads, dim).to(dtype) for _ in "kv"]
    k, v = (torch.randn(batch, heads, tokens, dim).to(dtype) for _ in "kv")
    page_table = torch.randperm(total)[: batch * pages].view(batch, pages).int()
    positions = torch.stack([torch.randperm(page_size * pages)[:tokens] for _ in range(batch)])
    positions[torch.rand(positions.shape) < 0.2] = -1
    return *caches, k, v, page_table, positions.int()


def copied(call):
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in call]


def assert_right(gpu, call):
    expected = copied(call)
    gpu(kv_write_, *call)
    reference.kv_write_(*expected)
    assert torch.equal(call[0], expected[0]) and torch.equal(call[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, page_size, dim", [(0, 4, 8), (1, 1, 8), (9, 5, 64), (40, 32, 24), (5, 4, 7)]
)
def test_equals_the_reference(gpu, tokens, page_size, dim, dtype):
    assert_right(gpu, random_call(2, 3, tokens, dim, page_size, 10 if page_size < 8 else 2, dtype))


@pytest.mark.hopper
def test_on_hopper_the_launch_overlaps_the_one_before_it(gpu):
    assert_right(gpu, random_call(tokens=9, page_size=5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_alignment(gpu, dtype):
    cache_k, cache_v, k, v, table, positions = random_call(dim=16, dtype=dtype)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = torch.randn(2, 3, 5, 17).to(dtype)[..., 1:]
    cache_v = cache_v.transpose(1, 2).contiguous().transpose(1, 2)
    assert_right(gpu, [cache_k, cache_v, k, v, table, positions])
    assert_right(gpu, [torch.randn(7, 4, 3, 17).to(dtype)[..., 1:], cache_v, k, v, table, positions])


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 300])
def test_the_later_token_stays(gpu, tokens):
    cache_k, cache_v, k, v, table, _ = random_call(tokens=tokens)
    positions = torch.full((2, tokens), 6, dtype=torch.int32)
    gpu(kv_write_, cache_k, cache_v, k, v, table, positions)
    assert torch.equal(cache_k[table[:, 1].long(), 2], k[:, :, -1])
    assert torch.equal(cache_v[table[:, 1].long(), 2], v[:, :, -1])


def test_positions_and_pages_out_of_range_are_skipped(gpu):
    cache_k, cache_v, k, v, table, positions = random_call()
    table[0] = torch.tensor([-1, 7, 2**31 - 1])
    positions[0] = torch.tensor([0, 1, 4, 8, 11])
    positions[1] = torch.tensor([12, -2, 2**31 - 1, -(2**31), 5])
    expected = copied([cache_k, cache_v])
    gpu(kv_write_, cache_k, cache_v, k, v, table, positions)
    for cache, before, fresh in zip((cache_k, cache_v), expected, (k, v), strict=True):
        before[table[1, 1], 1] = fresh[1, :, 4]
        assert torch.equal(cache, before)


# ---- on a GPU only ------------------------------------------------------------------------------------
@pytest.mark.graph
def test_graph_replay_follows_positions():
    call = [t.cuda() for t in random_call(tokens=4)]
    kv_write_(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv_write_(*call)
    call[5].copy_(torch.tensor([[1, -1, 5, 9], [-1, 2, 3, 4]]))
    expected = [t.cpu().clone() for t in call]
    graph.replay()
    reference.kv_write_(*expected)
    assert torch.equal(call[0].cpu(), expected[0]) and torch.equal(call[1].cpu(), expected[1])


def test_opcheck():
    torch.library.opcheck(torch.ops.dllm_kernels.kv_write_.default, [t.cuda() for t in random_call()])
