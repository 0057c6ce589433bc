"""kv_write_ on the CPU against its plain PyTorch reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from dllm_kernels import kv_write_
from dllm_kernels.ops import reference

OP = torch.ops.dllm_kernels.kv_write_.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_call(batch=2, heads=2, tokens=5, dim=8, page_size=4, pages=3, dtype=torch.float32):
    """cache_k, cache_v, k, v, page_table, positions: distinct positions, some skipped."""
    total = batch * pages + 1
    caches = [torch.randn(total, page_size, heads, dim).to(dtype) for _ in "kv"]
    k, v = (torch.randn(batch, heads, tokens, dim).to(dtype) for _ in "kv")
    page_table = torch.randperm(total)[: batch * pages].view(batch, pages).int()
    positions = torch.stack([torch.randperm(page_size * pages)[:tokens] for _ in range(batch)])
    positions[torch.rand(positions.shape) < 0.2] = -1
    return *caches, k, v, page_table, positions.int()


@given(st.integers(1, 3), st.integers(0, 9), st.integers(1, 7), st.sampled_from(DTYPES), st.integers(0, 999))
def test_equals_the_reference(batch, tokens, page_size, dtype, seed):
    torch.manual_seed(seed)
    call = random_call(batch, 2, tokens, 8, page_size, 10, dtype)
    ours, expected = ([t.clone() for t in call] for _ in range(2))
    ours[2] = ours[2].transpose(1, 2).contiguous().transpose(1, 2)
    kv_write_(*ours)
    reference.kv_write_(*expected)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_the_later_token_stays():
    cache_k, cache_v, k, v, page_table, _ = random_call(tokens=3)
    kv_write_(cache_k, cache_v, k, v, page_table, torch.full((2, 3), 6, dtype=torch.int32))
    assert torch.equal(cache_k[page_table[:, 1].long(), 2], k[:, :, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    opcheck(OP, random_call(dtype=dtype))
    opcheck(OP, random_call(tokens=0))


def test_autocast_follows_the_cache():
    cache_k, cache_v, k, v, page_table, positions = random_call(dtype=torch.bfloat16)
    expected = cache_k.clone()
    reference.kv_write_(expected, cache_v.clone(), k, v, page_table, positions)
    with torch.autocast("cpu", torch.bfloat16):
        kv_write_(cache_k, cache_v, k.float(), v, page_table, positions)
    assert torch.equal(cache_k, expected)


def replaced(position, value):
    call = list(random_call())
    call[position] = value
    return call


@pytest.mark.parametrize(
    "call, text",
    [
        (replaced(0, torch.zeros(7, 4, 2, 8).half()), "cache_k must have the dtype of k"),
        (replaced(1, torch.zeros(7, 4, 3, 8)), r"cache_v.shape\[2\] must be 2 \(the kv heads of k\)"),
        (replaced(3, torch.zeros(2, 2, 4, 8)), r"v.shape\[2\] must be 5"),
        (replaced(4, torch.zeros(2, 3)), "page_table must be int32, got float32"),
        (replaced(4, torch.full((2, 3), 7).int()), r"must be a page from 0 to 6, got 7"),
        (replaced(5, torch.zeros(2, 4).int()), r"positions.shape\[1\] must be 5"),
        (
            replaced(5, torch.full((2, 5), 12).int()),
            r"must be -1 \(skip\) or a position from 0 to 11, got 12",
        ),
        (replaced(5, torch.full((2, 5), -2).int()), "got -2"),
    ],
)
def test_bad_input_is_refused_by_name_and_writes_nothing(call, text):
    before = call[0].clone()
    for write in (OP, kv_write_):
        with pytest.raises(ValueError, match=text):
            write(*call)
    assert torch.equal(call[0], before)


def test_bad_types_are_refused_in_python():
    with pytest.raises(TypeError, match="positions must be a Tensor, got int"):
        kv_write_(*random_call()[:5], 3)
