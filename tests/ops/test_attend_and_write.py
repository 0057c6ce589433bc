"""attend_and_write_ on the CPU: the operators it stands for, one after the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import dllm_kernels as dk
from dllm_kernels import attend_and_write_
from dllm_kernels.ops import reference

OP = torch.ops.dllm_kernels.attend_and_write_.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random_call(batch=2, kv_heads=2, group=2, length=5, dim=16, page_size=4, pages=4, dtype=torch.float32):
    """The operator's arguments, in order: rows see the first half of their pages, and write the other."""
    total = batch * pages + 1
    k, v = torch.randn(2, batch, kv_heads, length, dim).to(dtype)
    cache_k, cache_v = torch.randn(2, total, page_size, kv_heads, dim).to(dtype)
    table = torch.randperm(total)[: batch * pages].view(batch, pages).int()
    half = pages * page_size // 2
    phase = torch.rand(batch, length, dim // 2).repeat(1, 1, 2)
    positions = torch.stack([half + torch.randperm(half)[:length] for _ in range(batch)])
    positions[torch.rand(positions.shape) < 0.3] = -1
    spans = torch.randint(0, half + 1, (batch, 1, 1, 2)).sort(-1).values.int()
    lengths = torch.randint(0, length + 1, (batch,)).int()
    return [
        torch.randn(batch, kv_heads * group, length, dim).to(dtype), k, v, cache_k, cache_v, table, spans,
        phase.cos().to(dtype), phase.sin().to(dtype), positions.int(), None, lengths, 0.3, None,
    ]  # fmt: skip


def copied(call):
    return [t.clone() if isinstance(t, torch.Tensor) else t for t in call]


@given(
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from([8, 24, 64]),
    st.sampled_from(DTYPES),
    st.integers(0, 999),
)
def test_equals_the_reference(batch, length, dim, dtype, seed):
    torch.manual_seed(seed)
    call = random_call(batch, length=length, dim=dim, dtype=dtype)
    ours, expected = copied(call), copied(call)
    (out, lse), (exact, exact_lse) = OP(*ours), reference.attend_and_write_(*expected)
    torch.testing.assert_close(out, exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, exact_lse, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(ours[3], expected[3], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(ours[3] == call[3], expected[3] == call[3]) and torch.equal(ours[4], expected[4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("writes", [True, False])
def test_the_bits_of_the_operators_one_after_the_other(rotates, writes, dtype):
    call = random_call(dtype=dtype)
    if not rotates:
        call[7] = call[8] = None
    if not writes:
        call[9] = None
    ours, (q, k, v, cache_k, cache_v, table, spans, cos, sin, positions, _, lengths, scale, _) = (
        copied(call),
        copied(call),
    )
    options = dict(q_lengths=lengths, scale=scale)
    out = attend_and_write_(*ours[:7], cos=ours[7], sin=ours[8], positions=ours[9], **options)
    if rotates:
        q, k = dk.rotate_half(q, k, cos, sin)
    assert torch.equal(out, dk.cached_block_attention(q, k, v, cache_k, cache_v, table, spans, **options))
    if writes:
        dk.kv_write_(cache_k, cache_v, k, v, table, positions)
    assert torch.equal(ours[3], cache_k) and torch.equal(ours[4], cache_v)


@pytest.mark.parametrize("rows", [1, 5])
def test_what_is_written_must_not_be_seen(rows):
    call = random_call()
    call[9][1] = torch.tensor([8, -1, 13, -1, 15])
    call[11] = torch.tensor([5, 3], dtype=torch.int32)
    call[6] = torch.zeros(2, rows, 2, 2, dtype=torch.int32)
    call[6][1, 2 % rows, 1] = torch.tensor([12, 14])
    before = call[3].clone()
    seen = rf"positions\[1, 2\] is 13 in page \d+, which cache_spans\[1, {2 % rows}, 1\] shows"
    with pytest.raises(ValueError, match=seen):
        OP(*call)
    assert torch.equal(call[3], before)
    call[11] = torch.tensor([5, 0], dtype=torch.int32)  # no query sees anything
    OP(*call)
    assert not torch.equal(call[3], before)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("reader", [0, 1])
def test_what_is_written_must_not_be_seen_by_another_sequence_that_shares_the_page(reader, rows):
    call, writer = random_call(), 1 - reader
    call[5] = torch.tensor([[2, 5, 0, 1], [4, 3, 6, 5]], dtype=torch.int32)  # page 5 is in both
    call[5][writer] = call[5][writer].roll(1)
    call[6] = torch.zeros(2, rows, 2, 2, dtype=torch.int32)
    entry = call[5].tolist()[reader].index(5)
    call[6][reader, rows - 1, 1] = torch.tensor([4 * entry + 1, 4 * entry + 3])
    own = 4 * call[5].tolist()[writer].index(5)  # where the page begins for the sequence that writes
    call[9] = torch.full((2, 5), -1, dtype=torch.int32)
    call[9][writer, 3] = own + 2
    call[11] = None
    before = call[3].clone()
    seen = rf"positions\[{writer}, 3\] is {own + 2} in page 5, which cache_spans\[{reader}, {rows - 1}, 1\]"
    with pytest.raises(ValueError, match=seen):
        OP(*call)
    assert torch.equal(call[3], before)
    call[9][writer, 3] = own + 3  # the page's other tokens are unseen
    OP(*call)
    assert not torch.equal(call[3], before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    opcheck(OP, random_call(dtype=dtype))
    opcheck(OP, [None if 7 <= i <= 9 else t for i, t in enumerate(random_call())])


def test_autocast_follows_the_cache():
    call = random_call(dtype=torch.bfloat16)
    mixed, expected = copied(call), copied(call)
    mixed[0], mixed[7] = mixed[0].float(), mixed[7].float()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = OP(*mixed)
    assert torch.equal(out, OP(*expected)[0]) and torch.equal(mixed[3], expected[3])


def test_bad_input_is_named_and_changes_nothing():
    call = random_call()
    before = call[3].clone()

    def refused(match, **changes):
        names = [argument.name for argument in OP._schema.arguments]
        with pytest.raises(ValueError, match=match):
            OP(**(dict(zip(names, call, strict=True)) | changes))
        assert torch.equal(call[3], before)

    refused("cos and sin must both be given, or neither", sin=None)
    refused(r"cos\.shape\[1\] must be 5", cos=call[7][:, :3])
    refused("positions must", positions=call[9].long())
    refused(r"positions\[0, 0\] must be -1 \(skip\) or a position from 0 to 15", positions=call[9] * 0 + 99)
    refused("cache_k and .*share memory|cache_k .*memory", cos=call[3].flatten()[:80].view(1, 5, 16))
    refused("plan must be what cached_attention_plan returns", plan=call[9][0])
