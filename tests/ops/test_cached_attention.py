"""cached_block_attention on the CPU against its plain PyTorch reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from dllm_kernels import SpanMask, block_attention, cached_block_attention, kv_write_
from dllm_kernels.ops import reference

OP = torch.ops.dllm_kernels.cached_block_attention.default
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def random_spans(batch, rows, high, count):
    cuts = torch.randint(0, high + 1, (batch, rows, 2 * count), dtype=torch.int32)
    return cuts.sort(-1).values.unflatten(-1, (count, 2))


def random_call(batch=2, kv_heads=2, group=2, length=9, dim=16, page_size=4, pages=5, dtype=torch.float32):
    """q, k, v, cache_k, cache_v, page_table: sequences own their pages, in random order."""
    q = torch.randn(batch, kv_heads * group, length, dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, length, dim).to(dtype) for _ in "kv")
    total = batch * pages + 2
    caches = [torch.randn(total, page_size, kv_heads, dim).to(dtype) for _ in "kv"]
    return q, k, v, *caches, torch.randperm(total)[: batch * pages].view(batch, pages).int()


def poison_unseen(cache_k, cache_v, page_table, spans):
    """NaN in every cached token that no query's spans show."""
    page_size = cache_k.shape[1]
    seen = torch.zeros(cache_k.shape[:2], dtype=torch.bool)
    for b, position in (
        reference.visible_keys(spans, page_table.shape[1] * page_size).any(1).nonzero().tolist()
    ):
        seen[page_table[b, position // page_size], position % page_size] = True
    for cache in (cache_k, cache_v):
        cache[~seen] = torch.nan


@given(st.data())
def test_equals_the_reference_and_never_reads_unseen_slots(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    batch, length, page_size = draw(st.integers(1, 3)), draw(st.integers(0, 40)), draw(st.integers(1, 33))
    pages, group = draw(st.integers(0, 5)), draw(st.integers(1, 7))
    dim = draw(st.sampled_from([8, 24, 64, 128]))
    call = random_call(batch, draw(st.integers(1, 2)), group, length, dim, page_size, pages, dtype)
    rows = draw(st.sampled_from([1, length]))
    cache_spans = random_spans(batch, rows, pages * page_size, draw(st.sampled_from([1, 2, 9])))
    fresh_spans = random_spans(batch, length, length, 2) if draw(st.booleans()) else None
    q_lengths = torch.randint(0, length + 1, (batch,)).int() if draw(st.booleans()) else None
    poison_unseen(*call[3:], cache_spans)
    if q_lengths is not None:
        for b, live in enumerate(q_lengths.tolist()):
            for tensor in call[:3]:
                tensor[b, :, live:] = torch.nan

    out, lse = cached_block_attention(
        *call, cache_spans, fresh_spans=fresh_spans, q_lengths=q_lengths, scale=0.3, return_lse=True
    )
    exact = (t.double().nan_to_num() for t in call[:5])
    expected, expected_lse = reference.cached_block_attention(
        *exact, call[5], cache_spans, fresh_spans, q_lengths, 0.3
    )
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_a_block_over_its_cached_prefix_equals_attention_over_the_whole_sequence():
    block, blocks, heads, page_size = 8, 6, 4, 16
    q, k, v = (torch.randn(1, n, block * blocks, 32) for n in (heads, 2, 2))
    cache_k, cache_v = (torch.full((3, page_size, 2, 32), torch.nan) for _ in "kv")
    page_table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    whole = block_attention(q, k, v, SpanMask.block_causal(block * blocks, block))
    for start in range(0, block * blocks, block):
        rows = slice(start, start + block)
        spans = torch.tensor([[[[0, start]]]], dtype=torch.int32)
        fresh = q[:, :, rows], k[:, :, rows], v[:, :, rows]
        out = cached_block_attention(*fresh, cache_k, cache_v, page_table, spans)
        torch.testing.assert_close(out, whole[:, :, rows], rtol=1e-5, atol=1e-5)
        positions = torch.arange(start, start + block, dtype=torch.int32)[None]
        kv_write_(cache_k, cache_v, *fresh[1:], page_table, positions)


def test_bits_do_not_depend_on_threads_company_or_pages():
    call = random_call(batch=3, kv_heads=2, group=4, length=32, dim=64, page_size=32, pages=8)
    spans = random_spans(3, 1, 256, 2)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(cached_block_attention(*call, spans))
    torch.set_num_threads(threads)
    assert all(torch.equal(out, results[0]) for out in results)
    q, k, v, cache_k, cache_v, page_table = call
    alone = cached_block_attention(
        q[1:2],
        k[1:2],
        v[1:2],
        cache_k.flip(0),
        cache_v.flip(0),
        len(cache_k) - 1 - page_table[1:2],
        spans[1:2],
    )
    assert torch.equal(alone[0], results[0][1])


LONG = 1024  # keys of a range with a softmax of its own


@given(st.data())
def test_ranges_of_a_long_cache_equal_the_reference(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    batch, length, dim = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 32, 40])),
        draw(st.sampled_from([8, 40])),
    )
    page_size = draw(st.sampled_from([17, 64, 700]))
    pages = draw(st.integers(LONG // page_size, 3 * LONG // page_size + 1))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    call = random_call(batch, 1, draw(st.integers(1, 5)), length, dim, page_size, pages, dtype)
    spans = random_spans(batch, draw(st.sampled_from([1, length])), pages * page_size, 2)
    if draw(st.booleans()):
        spans = spans // LONG * LONG  # whole ranges are unseen, and others begin at their first key
    poison_unseen(*call[3:], spans)
    q_lengths = torch.randint(0, length + 1, (batch,)).int() if draw(st.booleans()) else None
    exact = (t.double().nan_to_num() for t in call[:5])
    expected, expected_lse = reference.cached_block_attention(*exact, call[5], spans, None, q_lengths, 0.3)
    outputs, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        outputs.append(cached_block_attention(*call, spans, q_lengths=q_lengths, scale=0.3, return_lse=True))
    torch.set_num_threads(threads)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(outputs[0][0].double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(outputs[0][1].double(), expected_lse, rtol=1e-5, atol=1e-5)
    for out, lse in outputs[1:]:
        assert torch.equal(out, outputs[0][0]) and torch.equal(lse, outputs[0][1])


def test_a_longer_page_table_changes_no_bit_of_a_sequence():
    q, k, v, cache_k, cache_v, table = random_call(1, 2, 2, 32, 16, page_size=64, pages=40)
    spans = torch.tensor([[[[5, 1500]]]], dtype=torch.int32)
    short = cached_block_attention(q, k, v, cache_k, cache_v, table[:, :24], spans)
    assert torch.equal(short, cached_block_attention(q, k, v, cache_k, cache_v, table, spans))
    many = [tensor.expand(12, -1, -1, -1) for tensor in (q, k, v)]
    together = cached_block_attention(
        *many, cache_k, cache_v, table.expand(12, -1), spans.expand(12, -1, -1, -1)
    )
    assert torch.equal(together[7], short[0])


def operator_cases():
    call, spans = random_call(), random_spans(2, 1, 20, 2)
    fresh, lengths = random_spans(2, 9, 9, 1), torch.tensor([9, 4], dtype=torch.int32)
    yield "all arguments", (*call, spans, fresh, lengths, 0.5)
    yield "defaults", (*call, spans, None, None, 0.5)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in call[:3]]
    yield "transposed", (*transposed, *call[3:], random_spans(2, 9, 20, 2), None, lengths, 0.5)
    yield "empty batch", (*random_call(batch=0), torch.zeros(0, 1, 1, 2, dtype=torch.int32), None, None, 0.5)


@pytest.mark.parametrize("case", list(operator_cases()), ids=lambda case: case[0])
def test_opcheck(case):
    opcheck(OP, case[1])


def test_autocast_follows_the_cache():
    q, k, v, cache_k, cache_v, page_table = random_call(dtype=torch.bfloat16)
    spans = random_spans(2, 1, 20, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = cached_block_attention(q.float(), k.float(), v, cache_k, cache_v, page_table, spans)
    assert torch.equal(out, cached_block_attention(q, k, v, cache_k, cache_v, page_table, spans))


def replaced(position, value):
    call = [*random_call(), random_spans(2, 1, 20, 1), None, None, 0.5]
    call[position] = value
    return call


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    r"k.shape\[2\] must be 9": [*random_call()[:1], *random_call(length=8)[1:], random_spans(2, 1, 20, 1)],
    "cache_k must have the dtype of k": replaced(3, torch.zeros(12, 4, 2, 16).half()),
    r"cache_k.shape\[2\] must be 2": replaced(3, torch.zeros(12, 4, 3, 16)),
    r"cache_v.shape\[1\] must be 4": replaced(4, torch.zeros(12, 5, 2, 16)),
    "cache_v must be contiguous in its last dimension": replaced(4, torch.zeros(12, 4, 16, 2).mT),
    "page_table must be int32, got int64": replaced(5, torch.zeros(2, 5).long()),
    r"page_table.shape\[0\] must be 2": replaced(5, int32([[0]])),
    r"page_table\[1, 0\] must be a page from 0 to 11, got 12": [
        *replaced(5, int32([[0], [12]]))[:6],
        int32([[[[0, 4]]], [[[0, 1]]]]),
    ],
    r"cache_spans must be \[2, 1 or 9, at least 1, 2\]": replaced(6, random_spans(2, 2, 20, 1)),
    r"cache_spans\[1, 0, 0\] must have 0 <= start <= end <= 20": replaced(
        6, int32([[[[0, 1]]], [[[0, 21]]]])
    ),
    r"fresh_spans\[0, 0, 0\] must have 0 <= start <= end <= 9": replaced(
        7, int32([0, 10]).expand(2, 9, 1, 2)
    ),
    r"q_lengths\[1\] must be from 0 to 9, got 10": replaced(8, int32([9, 10])),
    "q_lengths must be int32": replaced(8, torch.tensor([9, 9])),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_refused_by_name(text):
    call = [*BAD[text], None, None, 0.5][:10] if len(BAD[text]) < 10 else BAD[text]
    with pytest.raises(ValueError, match=text):
        OP(*call)
    with pytest.raises(ValueError, match=text):
        cached_block_attention(*call[:7], fresh_spans=call[7], q_lengths=call[8], scale=call[9])


def test_what_dead_rows_and_unused_table_entries_hold_does_not_matter():
    q, k, v, cache_k, cache_v, page_table = random_call()
    spans = random_spans(2, 9, 8, 1)
    spans[1, 4:] = 1000
    page_table[:, 2:] = -1
    lengths = int32([9, 4])
    out = cached_block_attention(q, k, v, cache_k, cache_v, page_table, spans, q_lengths=lengths)
    assert (out[1, :, 4:] == 0).all() and out.isfinite().all()
