"""TokenStats.divergence: KL between this step's softmax and the one before."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_kernels as dk
from dllm_kernels.ops.reference import unmask as reference
from tests.ops.test_token_stats import DTYPES, assert_equal, random_logits


def test_the_reference_is_torchs_kl_div():
    p, q = random_logits(0, 3, 40).double(), random_logits(1, 3, 40).double()
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(reference.token_divergence(p, q), kl.sum(-1))


@given(
    rows=st.integers(0, 4),
    vocabulary=st.integers(1, 2100),
    dtype=st.sampled_from(DTYPES),
    confidence_temperature=st.sampled_from([1.0, 0.5, 2.0]),
    distance=st.sampled_from([0.0, 0.01, 3.0]),
    precision=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_agrees_with_the_reference(
    rows, vocabulary, dtype, confidence_temperature, distance, precision, seed, data
):
    ids = st.lists(st.integers(0, vocabulary - 1), max_size=min(4, (vocabulary - 1) // 2))
    logits = random_logits(seed, rows, vocabulary, dtype=dtype)
    previous = (logits + distance * torch.randn(rows, vocabulary)).to(dtype)
    options = {
        "suppress_tokens": data.draw(ids),
        "confidence_exclude": data.draw(ids),
        "confidence_temperature": confidence_temperature,
    }
    got = dk.token_stats(logits, previous=previous, precision=precision, **options)
    tolerance = 1e-5 if precision == "float32" else 1e-6  # the scaled logits are float32 in both
    expected = reference.token_divergence(logits, previous, **options)
    torch.testing.assert_close(got.divergence.double(), expected, rtol=tolerance, atol=tolerance)
    assert bool((got.divergence >= 0).all())
    assert_equal(got, dk.token_stats(logits, precision=precision, **options))


def test_equal_logits_have_no_divergence_and_a_shift_makes_none():
    logits = random_logits(0, 3, 70_000)
    assert dk.token_stats(logits, previous=logits).divergence.tolist() == [0, 0, 0]
    shifted = dk.token_stats(logits, previous=logits + 8).divergence
    assert float(shifted.max()) < 2e-6


def test_weight_where_there_was_none_is_infinite():
    now, before = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-math.inf, 2.0, 3.0]])
    assert dk.token_stats(now, previous=before).divergence.item() == math.inf
    assert dk.token_stats(now, previous=before, suppress_tokens=[0]).divergence.item() == 0
    assert dk.token_stats(before, previous=now).divergence.item() == pytest.approx(
        -math.log(1 - math.e / (math.e + math.e**2 + math.e**3)), abs=1e-6
    )
    nothing = torch.full((1, 3), math.nan)
    assert dk.token_stats(nothing, previous=now).divergence.item() == math.inf
    assert dk.token_stats(now, previous=nothing).divergence.item() == math.inf


def test_filters_do_not_touch_it():
    now, before = random_logits(0, 3, 500), random_logits(1, 3, 500)
    plain = dk.token_stats(now, previous=before).divergence
    assert torch.equal(dk.token_stats(now, previous=before, top_k=3).divergence, plain)


def test_strided_logits_are_read_in_place():
    whole, before = random_logits(0, 3, 8, 50), random_logits(1, 3, 8, 50)
    got = dk.token_stats(whole[:, 2:5], previous=before[:, 2:5]).divergence
    expected = dk.token_stats(whole[:, 2:5].contiguous(), previous=before[:, 2:5].contiguous()).divergence
    assert got.shape == (3, 3) and torch.equal(got, expected)


@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((random_logits(0, 3, 50), random_logits(1, 3, 50)), {}),
        ((random_logits(0, 2, 3, 50).transpose(0, 1), random_logits(1, 3, 2, 50)), {"float64": True}),
        ((random_logits(0, 0, 50), random_logits(1, 0, 50)), {"suppress_tokens": [1]}),
    ],
)
def test_opcheck(args, kwargs):
    torch.library.opcheck(torch.ops.dllm_kernels.token_divergence, args, kwargs)


def test_compiles_without_graph_breaks():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def divergence(logits, previous):
        return dk.token_stats(logits * 2, previous=previous).divergence + 1

    for rows in (2, 5):
        now, before = random_logits(rows, rows, 40), random_logits(1, rows, 40)
        assert torch.equal(divergence(now, before), dk.token_stats(now * 2, previous=before).divergence + 1)


@pytest.mark.parametrize(
    "previous, message",
    [
        (torch.zeros(2, 4), r"previous must have the shape of logits \(\[2, 5\]\), got shape \[2, 4\]"),
        (torch.zeros(2, 5, dtype=torch.float64), "previous must have the dtype of logits"),
    ],
)
def test_bad_input_is_named(previous, message):
    for function in (
        lambda: dk.token_stats(torch.zeros(2, 5), previous=previous),
        lambda: torch.ops.dllm_kernels.token_divergence(torch.zeros(2, 5), previous),
    ):
        with pytest.raises(ValueError, match=f"token_stats: {message}"):
            function()
