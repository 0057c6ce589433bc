"""top_p and top_k of token_stats, against Dream's filters written out in float64."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dllm_kernels as dk
from dllm_kernels.ops.reference import unmask as reference
from tests.ops.test_token_stats import DTYPES, assert_agrees, assert_equal, random_logits


def near_the_edge(logits: torch.Tensor, top_p: float, confidence_temperature: float, suppressed) -> bool:
    """Does some cumulated probability lie so near top_p that rounding decides what is kept?"""
    x = logits.double() / confidence_temperature
    x[:, suppressed] = -math.inf
    cumulated = x.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    return bool(((cumulated - top_p).abs() < 1e-5).any())


@settings(max_examples=60)
@given(
    rows=st.integers(0, 4),
    vocabulary=st.integers(1, 2100),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.0, 0.7]),
    confidence_temperature=st.sampled_from([1.0, 0.7]),
    top_p=st.sampled_from([None, 0.0, 0.3, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([None, 1, 2, 50, 5000]),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_agrees_with_the_reference(
    rows, vocabulary, dtype, temperature, confidence_temperature, top_p, top_k, seed, data
):
    ids = st.lists(st.integers(0, vocabulary - 1), max_size=min(4, (vocabulary - 1) // 2))
    logits = random_logits(seed % 1000, rows, vocabulary, dtype=dtype)
    suppressed = data.draw(ids)
    assume(top_p is None or not near_the_edge(logits, top_p, confidence_temperature, suppressed))
    assert_agrees(
        logits,
        temperature=temperature,
        seed=seed,
        suppress_tokens=suppressed,
        proposal_exclude=data.draw(ids),
        confidence_exclude=data.draw(ids),
        confidence_temperature=confidence_temperature,
        top_p=top_p,
        top_k=top_k,
    )


@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_agrees_on_a_large_vocabulary(scale):
    logits = random_logits(1, 2, 126_464, scale=scale)
    for options in ({"top_p": 0.9}, {"top_k": 50}, {"top_p": 0.9, "top_k": 3000}, {"top_k": 100_000}):
        if "top_k" in options or not near_the_edge(logits, 0.9, 1.0, []):
            assert_agrees(logits, tolerance=1e-5, precision="float64", **options)


def test_the_first_token_above_top_p_stays():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, left in ((0.1, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3)):
        got = dk.token_stats(logits, top_p=top_p)
        assert got.prob.item() == pytest.approx(0.5 / sum([0.5, 0.3, 0.2][:left]))


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"top_k": 1}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_single_token_left_is_certain(options, temperature):
    logits = random_logits(2, 5, 3000)
    got = dk.token_stats(logits, temperature=temperature, **options)
    assert torch.equal(got.token, logits.argmax(-1))
    assert got.prob.tolist() == got.margin.tolist() == [1] * 5
    assert float(got.entropy.max()) < 1e-30


def test_ties_at_the_edge_stay_in_top_k_and_go_to_the_lowest_ids_in_top_p():
    logits = torch.zeros(1, 20_000)
    assert dk.token_stats(logits, top_k=2).prob.item() == pytest.approx(1 / 20_000)
    # Kept while the mass before is at most 0.35: ids 0 to 7000.
    assert dk.token_stats(logits, top_p=0.35, precision="float64").prob.item() == pytest.approx(1 / 7001)
    tokens = dk.token_stats(logits.expand(200, -1), temperature=1.0, top_p=0.35).token
    assert int(tokens.max()) <= 7000


def test_filters_that_keep_everything_change_nothing():
    logits = random_logits(3, 4, 5000)
    plain = dk.token_stats(logits, temperature=0.8, seed=1)
    assert_equal(dk.token_stats(logits, temperature=0.8, seed=1, top_p=1.0, top_k=5000), plain)


def test_drawn_tokens_follow_the_filtered_softmax():
    """Chi-square over 20,000 draws; the seed is fixed, so this is a fact, not a chance."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.5, -2.0, 1.5])
    n, temperature = 20_000, 0.8
    options = {"temperature": temperature, "confidence_temperature": temperature, "seed": 1}
    token = dk.token_stats(logits.expand(n, 8), top_p=0.8, **options).token
    left = reference.kept(logits[None].double() / temperature, top_p=0.8)[0]
    expected = (logits / temperature).masked_fill(~left, -math.inf).softmax(0) * n
    counts = token.bincount(minlength=8)
    assert counts[~left].sum() == 0
    assert 2 <= int(left.sum()) <= 4
    assert float((((counts - expected) ** 2)[left] / expected[left]).sum()) < 16.3  # 99.9%, 3 degrees


def test_excluded_ids_are_filtered_like_any_other():
    """As in references that keep the mask token in the softmax: it takes one of the k places."""
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    got = dk.token_stats(logits, top_k=2, proposal_exclude=[0])
    assert got.token.item() == 1 and got.prob.item() == pytest.approx(1 / (1 + math.e))
    alone = dk.token_stats(logits, top_k=1, proposal_exclude=[0])
    assert alone.token.item() == 1 and alone.prob.item() == 0 and alone.margin.item() == 0


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_row_without_a_finite_logit_yields_the_lowest_allowed_id(value):
    got = dk.token_stats(torch.full((2, 100), value), top_p=0.5, top_k=3, suppress_tokens=[0])
    assert got.token.tolist() == [1, 1] and got.prob.tolist() == [0, 0]


def test_a_row_is_the_same_alone_and_with_any_number_of_threads():
    logits = random_logits(5, 4, 70_001)
    options = {"temperature": 0.7, "seed": 9, "top_p": 0.9, "top_k": 1000}
    ids = torch.randint(0, 1000, (4, 3), dtype=torch.int32)
    together = dk.token_stats(logits, noise_ids=ids, **options)
    threads = torch.get_num_threads()
    try:
        for row in range(4):
            torch.set_num_threads(row + 1)
            one = slice(row, row + 1)
            alone = dk.token_stats(logits[one], noise_ids=ids[one], **options)
            assert_equal(alone, [field[one] for field in together[:5]])
    finally:
        torch.set_num_threads(threads)


def test_unmask_takes_the_filters():
    """Without the filter no proposal is sure enough."""
    logits = torch.tensor([[[2.0, 1.9, 1.8, 0.0]] * 4])
    for top_k, accepted in ((None, 1), (1, 4)):
        canvas = torch.full((1, 4), 3)
        rule = dk.Rule.threshold(0.9)
        got = dk.unmask_(canvas, logits, rule, mask_id=3, block_start=0, block_size=4, top_k=top_k)
        assert int(got.sum()) == accepted
