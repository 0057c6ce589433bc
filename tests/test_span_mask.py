"""SpanMask against dense masks written pair by pair."""

import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_kernels import SpanMask

SIDES = st.sampled_from(["right", "left"])


@st.composite
def padded(draw, most=12):
    """(seq_len, lengths argument or None, the same as a list, padding_side)."""
    seq_len = draw(st.integers(0, most))
    length = st.integers(0, seq_len)
    kind = draw(st.sampled_from(["none", "int", "tensor"]))
    side = draw(SIDES)
    if kind == "none":
        return seq_len, None, [seq_len], side
    if kind == "int":
        value = draw(length)
        return seq_len, value, [value], side
    values = draw(st.lists(length, min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return seq_len, torch.tensor(values, dtype=dtype), values, side


def dense(size, lengths, side, sees):
    """bool [B, size, size]; sees(row, q, k) is asked for real positions only."""
    mask = torch.zeros(len(lengths), size, size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        first = size - length if side == "left" else 0
        for q in range(length):
            for k in range(length):
                mask[row, first + q, first + k] = sees(row, q, k)
    return mask


CLEAN = st.sampled_from(["block_causal", "causal"])


def block_diffusion_sees(block_size, clean, q_half, q, k_half, k):
    q_block, k_block = q // block_size, k // block_size
    if q_half == 0:
        return q_block == k_block if k_half == 0 else k_block < q_block
    return k_half == 1 and (k <= q if clean == "causal" else k_block <= q_block)


def assert_canonical(mask):
    """Assert that the validating constructor accepts a mask."""
    assert mask.spans.dtype == torch.int32
    SpanMask(mask.spans, mask.kv_len)


def assert_is(mask, expected):
    assert_canonical(mask)
    assert torch.equal(mask.to_dense(), expected)
    assert mask.density() == pytest.approx(expected.float().mean().item() if expected.numel() else 0.0)


@given(padded())
def test_full_self_attention(case):
    seq_len, lengths, values, side = case
    assert_is(
        SpanMask.full(seq_len, lengths=lengths, padding_side=side),
        dense(seq_len, values, side, lambda *_: True),
    )


@given(st.integers(0, 6), padded())
def test_full_with_kv_len_pads_keys_only(q_len, case):
    kv_len, lengths, values, side = case
    expected = torch.zeros(len(values), q_len, kv_len, dtype=torch.bool)
    for row, length in enumerate(values):
        for k in range(length):
            expected[row, :, k + (kv_len - length if side == "left" else 0)] = True
    assert_is(SpanMask.full(q_len, kv_len, lengths, side), expected)


@given(padded(), st.integers(0, 14))
def test_causal(case, reach):
    seq_len, lengths, values, side = case
    assert_is(SpanMask.causal(seq_len, lengths, side), dense(seq_len, values, side, lambda _, q, k: k <= q))
    expected = dense(seq_len, values, side, lambda _, q, k: k < q + 1 + reach)
    assert_is(SpanMask.causal(seq_len, lengths, side, reach), expected)


@given(padded(), st.integers(0, 14))
def test_sliding_window(case, window):
    seq_len, lengths, values, side = case
    expected = dense(seq_len, values, side, lambda _, q, k: abs(q - k) <= window)
    assert_is(SpanMask.sliding_window(seq_len, window, lengths, side), expected)


@given(padded(), st.integers(1, 14), st.integers(-20, 20))
def test_block_causal(case, block_size, offset):
    seq_len, lengths, values, side = case
    expected = dense(
        seq_len, values, side, lambda _, q, k: (k + offset) // block_size <= (q + offset) // block_size
    )
    assert_is(SpanMask.block_causal(seq_len, block_size, lengths, offset, side), expected)


@given(padded(), st.integers(1, 5), st.data())
def test_block_causal_with_an_offset_for_each_row(case, block_size, data):
    seq_len, lengths, values, side = case
    if not isinstance(lengths, torch.Tensor):
        values = values * data.draw(st.integers(1, 3))
    offsets = data.draw(st.lists(st.integers(-9, 9), min_size=len(values), max_size=len(values)))
    expected = dense(
        seq_len,
        values,
        side,
        lambda row, q, k: (k + offsets[row]) // block_size <= (q + offsets[row]) // block_size,
    )
    mask = SpanMask.block_causal(seq_len, block_size, lengths, torch.tensor(offsets), side)
    assert_is(mask, expected)


@given(padded(8), st.integers(1, 10), CLEAN)
def test_block_diffusion(case, block_size, clean):
    seq_len, lengths, values, side = case
    expected = torch.zeros(len(values), 2 * seq_len, 2 * seq_len, dtype=torch.bool)
    for row, length in enumerate(values):
        first = seq_len - length if side == "left" else 0
        for q_half in (0, 1):
            for k_half in (0, 1):
                for q in range(length):
                    for k in range(length):
                        expected[row, q_half * seq_len + first + q, k_half * seq_len + first + k] = (
                            block_diffusion_sees(block_size, clean, q_half, q, k_half, k)
                        )
    mask = SpanMask.block_diffusion(seq_len, block_size, lengths, side, clean)
    assert mask.kv_len == 2 * seq_len
    assert_is(mask, expected)


def test_block_diffusion_written_out():
    mask = SpanMask.block_diffusion(4, 2).to_dense()[0].int().tolist()
    assert mask == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=3),
    st.sampled_from(["full", "causal", "block_causal", "block_diffusion"]),
    st.integers(1, 4),
    SIDES,
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 3),
    CLEAN,
)
def test_packed(batch, inner, block_size, side, as_tensor, padding, reach, clean):
    longest = max(sum(row) for row in batch)
    seq_len = longest + padding
    halves = 2 if inner == "block_diffusion" else 1
    expected = torch.zeros(len(batch), halves * seq_len, halves * seq_len, dtype=torch.bool)
    for row, lengths in enumerate(batch):
        tokens = [(document, p) for document, length in enumerate(lengths) for p in range(length)]
        first = seq_len - len(tokens) if side == "left" else 0
        everything = [(half, i, *token) for half in range(halves) for i, token in enumerate(tokens)]
        for q_half, q_index, q_document, q in everything:
            for k_half, k_index, k_document, k in everything:
                sees = (
                    q_document == k_document
                    and {
                        "full": True,
                        "causal": k <= q + reach,
                        "block_causal": k // block_size <= q // block_size,
                        "block_diffusion": block_diffusion_sees(block_size, clean, q_half, q, k_half, k),
                    }[inner]
                )
                expected[row, q_half * seq_len + first + q_index, k_half * seq_len + first + k_index] = sees
    argument = batch
    if as_tensor:
        argument = torch.tensor([row + [0] * (4 - len(row)) for row in batch])
    size = block_size if inner.startswith("block") else None
    options = {"causal": {"reach": reach}, "block_diffusion": {"clean": clean}}.get(inner, {})
    if padding:
        options["seq_len"] = seq_len
    assert_is(SpanMask.packed(argument, inner, size, side, **options), expected)


def test_packed_takes_one_row_as_ints_or_tensor():
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()[None]
    assert_is(SpanMask.packed([2, 3]), expected)
    assert_is(SpanMask.packed(torch.tensor([2, 3])), expected)
    assert_is(SpanMask.packed((2, 3), padding_side="left"), expected)


@given(st.integers(0, 3), st.integers(0, 6), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_from_dense_and_back(batch, q_len, kv_len, seed):
    generator = torch.Generator().manual_seed(seed)
    expected = torch.rand(batch, q_len, kv_len, generator=generator) < 0.6
    mask = SpanMask.from_dense(expected)
    assert_canonical(mask)
    assert torch.equal(mask.to_dense(), expected)
    ranges = (
        [
            sum(row[k] and not (k and row[k - 1]) for k in range(kv_len))
            for row in expected.reshape(-1, kv_len).tolist()
        ]
        if kv_len
        else []
    )
    assert mask.spans.shape[2] == max([1, *ranges])
    if batch:
        assert torch.equal(SpanMask.from_dense(expected[0]).to_dense(), expected[:1])


@settings(max_examples=20)
@given(
    st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 8, 16]), st.integers(0, 9)
)
def test_to_block_mask_matches_torch(batch, q_len, kv_len, block_size, seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, -(-q_len // 8), -(-kv_len // 8), generator=generator) < 0.5
    allowed = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :q_len, :kv_len]
    ours = SpanMask.from_dense(allowed).to_block_mask(block_size)
    from torch.nn.attention.flex_attention import create_block_mask

    theirs = create_block_mask(
        lambda b, h, q, k: allowed[b, q, k], batch, 1, q_len, kv_len, device="cpu", BLOCK_SIZE=block_size
    )
    assert ours.seq_lengths == theirs.seq_lengths
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    for tiles, indices in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
    ):
        counts, mine, other = getattr(ours, tiles), getattr(ours, indices), getattr(theirs, indices)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            used = int(counts[tuple(at)])
            assert torch.equal(mine[tuple(at)][:used], other[tuple(at)][:used])


@pytest.mark.parametrize("batch", [1, 2])
def test_flex_attention_through_to_block_mask(batch):
    from torch.nn.attention.flex_attention import flex_attention

    lengths = torch.tensor([12, 7])[:batch] if batch > 1 else None
    mask = SpanMask.block_diffusion(12, 4, lengths)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 24, 8).unbind(0)
    out = flex_attention(q, k, v, block_mask=mask.to_block_mask(8))
    dense_mask = mask.to_dense()[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask)
    seen = dense_mask.any(-1, keepdim=True).expand_as(q)
    assert torch.allclose(out[seen], expected[seen], atol=1e-5)


# ---- what is refused ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([[0, 9]], r"lie in 0\.\.8 \(kv_len\); spans\[0, 0, 0\] is \[0, 9\]"),
        ([[-1, 4]], "lie in 0..8"),
        ([[-3, -1]], "lie in 0..8"),
        ([[5, 3]], "start < end"),
        ([[5, 5]], "start < end"),
        ([[0, 3], [2, 5]], r"sorted and disjoint within a row; spans\[0, 0, 1\] is \[2, 5\]"),
        ([[4, 6], [0, 2]], "sorted and disjoint"),
        ([[0, 0], [2, 5]], "before the empty ones"),
        ([[0, 2], [0, 0], [4, 6]], "before the empty ones"),
    ],
)
def test_bad_spans_are_refused(row, says):
    with pytest.raises(ValueError, match=says):
        SpanMask(torch.tensor([[row]], dtype=torch.int32), 8)


@given(st.lists(st.tuples(st.integers(-1, 7), st.integers(-1, 7)), min_size=1, max_size=3))
def test_the_constructor_accepts_exactly_the_canonical_rows(row):
    used = [span for span in row if span != (0, 0)]
    fine = (
        row[: len(used)] == used
        and all(0 <= start < end <= 6 for start, end in used)
        and all(a[1] <= b[0] for a, b in pairwise(used))
    )
    spans = torch.tensor([[row]], dtype=torch.int32)
    if fine:
        seen = {k for start, end in used for k in range(start, end)}
        assert SpanMask(spans, 6).to_dense()[0, 0].tolist() == [k in seen for k in range(6)]
    else:
        with pytest.raises(ValueError, match="spans must"):
            SpanMask(spans, 6)


SPANS = torch.zeros(1, 2, 1, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: SpanMask([[0, 1]], 4), TypeError, "spans must be an int32 Tensor"),
        (lambda: SpanMask(SPANS.long(), 4), TypeError, "spans must be an int32 Tensor.*int64"),
        (lambda: SpanMask(SPANS[0], 4), ValueError, r"spans must be \[B or 1, Sq, R, 2\]"),
        (lambda: SpanMask(SPANS[:, :, :0], 4), ValueError, "R >= 1"),
        (lambda: SpanMask(SPANS, -1), ValueError, "kv_len"),
        (lambda: SpanMask(SPANS, 4.0), TypeError, "kv_len must be an integer, got float"),
        (lambda: SpanMask.full(-1), ValueError, "q_len"),
        (lambda: SpanMask.full(True), TypeError, "q_len"),
        (lambda: SpanMask.causal(8, 9), ValueError, r"lengths must lie in 0\.\.8, got 9"),
        (lambda: SpanMask.causal(8, torch.tensor([3, -2])), ValueError, "got -2 at index 1"),
        (lambda: SpanMask.causal(8, torch.tensor([3.0])), TypeError, "lengths"),
        (lambda: SpanMask.causal(8, torch.tensor([[3]])), ValueError, "lengths"),
        (lambda: SpanMask.causal(8, [3, 4]), TypeError, "lengths must be an integer, got list"),
        (lambda: SpanMask.causal(8, 3, "middle"), ValueError, 'padding_side must be "right" or "left"'),
        (lambda: SpanMask.sliding_window(8, -1), ValueError, "window"),
        (lambda: SpanMask.block_causal(8, 0), ValueError, "block_size"),
        (lambda: SpanMask.block_causal(8, 4, offset=1.5), TypeError, "offset"),
        (
            lambda: SpanMask.block_causal(8, 4, torch.tensor([8, 8]), torch.tensor([0, 1, 2])),
            ValueError,
            "offset must match lengths",
        ),
        (lambda: SpanMask.block_diffusion(8, 2.0), TypeError, "block_size"),
        (lambda: SpanMask.packed([3, -1]), ValueError, "document_lengths"),
        (lambda: SpanMask.packed(torch.tensor([3, -1])), ValueError, "document_lengths"),
        (lambda: SpanMask.packed(7), TypeError, "document_lengths"),
        (lambda: SpanMask.packed("77"), TypeError, "document_lengths"),
        (lambda: SpanMask.packed([[1], 2]), TypeError, "document_lengths"),
        (lambda: SpanMask.packed([3], "windowed"), ValueError, "inner must be one of full, causal"),
        (lambda: SpanMask.packed([3], "block_causal"), TypeError, "block_size"),
        (lambda: SpanMask.packed([3], "full", 4), ValueError, "block_size has no meaning"),
        (lambda: SpanMask.packed([3], "full", reach=1), ValueError, "reach has no meaning with inner='full'"),
        (lambda: SpanMask.packed([3], "causal", clean="causal"), ValueError, "clean has no meaning"),
        (lambda: SpanMask.packed([3, 2], seq_len=4), ValueError, r"seq_len must lie in 5\.\."),
        (lambda: SpanMask.causal(8, reach=-1), ValueError, "reach must lie in 0"),
        (lambda: SpanMask.block_diffusion(8, 4, clean="full"), ValueError, 'clean must be "block_causal" or'),
        (lambda: SpanMask.from_dense(torch.ones(2, 2)), TypeError, "mask must be a bool Tensor"),
        (lambda: SpanMask.from_dense(torch.ones(2, dtype=torch.bool)), ValueError, r"\[Sq, Sk\]"),
    ],
)
def test_bad_arguments_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


# ---- as an object ------------------------------------------------------------------------------
def test_a_mask_is_frozen_hashable_and_pickles():
    mask = SpanMask.causal(4)
    with pytest.raises(AttributeError):
        mask.kv_len = 5
    assert {mask: 1}[mask] == 1
    assert torch.equal(pickle.loads(pickle.dumps(mask)).spans, mask.spans)
    assert repr(mask) == "SpanMask(spans=int32 [1, 4, 1, 2] on cpu, kv_len=4)"


def test_to_another_device_keeps_everything_but_the_device():
    mask = SpanMask.causal(4)
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert moved.spans.device.type == "meta"
    assert (moved.spans.shape, moved.kv_len) == (mask.spans.shape, mask.kv_len)


def test_a_mask_works_inside_torch_compile():
    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def masked(scores, mask, lengths):
        own = SpanMask.block_causal(scores.shape[-1], 2, lengths)
        given_mask = SpanMask(mask.spans, mask.kv_len)
        return scores.masked_fill(~(given_mask.to_dense() & own.to_dense()), 0.0)

    for seq_len in (6, 7):
        scores, lengths = torch.randn(2, seq_len, seq_len), torch.tensor([seq_len, 3])
        mask = SpanMask.causal(seq_len)
        visible = dense(seq_len, [seq_len, 3], "right", lambda _, q, k: k <= q)
        assert torch.equal(masked(scores, mask, lengths), scores * visible)
