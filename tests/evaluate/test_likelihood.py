"""Estimates equal plain float64 likelihoods of the same model, whatever its head, attention and shift."""

import itertools
import math

import numpy as np
import pytest
import torch

import dllm_kernels as dk
from dllm_train.evaluate.likelihood import log_likelihoods
from dllm_train.evaluate.masks import masked_counts, masked_targets
from tests.evaluate.plain_likelihood import BLOCK, MASK
from tests.evaluate.tiny_diffusion import with_plain

# What models differ in: grouped heads and tied embeddings; biases; learned positions; a soft cap of logits;
# heads with a transform; positions that begin late.
DECODERS = ("qwen3", "qwen2", "gpt2", "gemma2")
ENCODERS = ("bert", "roberta", "modernbert")
KINDS = [
    (name, attention, shift)
    for name in DECODERS
    for attention in ("bidirectional", "block_causal")
    for shift in (False, True)
] + [(name, "bidirectional", False) for name in ENCODERS]
LENGTHS = [(0, 1), (0, 6), (1, 3), (3, 2), (4, 4), (5, 7), (8, 1), (9, 3), (7, 9)]  # around blocks of 4


def requests_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(3, MASK, (length,), generator=generator).tolist() for length in pair)
        for pair in lengths
    ]


def values(estimates):
    return [estimate.log_likelihood for estimate in estimates]


def drawn_bound(plain, context, target, samples, seed, request_id):
    """The mean over the samples that were drawn, each computed alone, summed over segments."""
    total, place = 0.0, 0
    for ids, places in plain.segments(context, target):
        length, key = len(places), dict(seed=seed, request_id=request_id, place=place)
        counts = masked_counts(length, samples, **key)
        scores = []
        for row, count in zip(masked_targets(counts, length, **key), counts, strict=True):
            masked = {places[index] for index in np.flatnonzero(row)}
            scores.append(sum(plain.masked_log_p(ids, masked)) * length / count)
        total, place = total + sum(scores) / samples, place + length
    return total


@pytest.mark.parametrize("name, attention, shift", KINDS)
def test_the_chain_rule_is_exact(name, attention, shift):
    model, plain = with_plain(name, attention=attention, shift=shift)
    requests = requests_of(LENGTHS)
    for estimator, backwards in (("ar_ftb", False), ("ar_btf", True)):
        expected = [plain.chain(*request, backwards=backwards) for request in requests]
        estimates = log_likelihoods(model, requests, estimator=estimator)
        assert values(estimates) == pytest.approx(expected, rel=1e-4)
        assert all(estimate.standard_error == 0 for estimate in estimates)


@pytest.mark.parametrize("name, attention, shift", KINDS)
def test_a_bound_is_the_mean_over_its_samples(name, attention, shift):
    model, plain = with_plain(name, attention=attention, shift=shift)
    requests = requests_of(LENGTHS)
    expected = [
        drawn_bound(plain, *request, samples=3, seed=5, request_id=index)
        for index, request in enumerate(requests)
    ]
    assert values(log_likelihoods(model, requests, samples=3, seed=5)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name, attention, shift", KINDS)
def test_the_confidence_order_is_that_of_the_sampler(name, attention, shift):
    model, plain = with_plain(name, attention=attention, shift=shift)
    requests = requests_of(pair for pair in LENGTHS if pair[0])  # without context all masks look alike
    expected, _ = zip(*(plain.revealed(*request) for request in requests), strict=True)
    assert values(log_likelihoods(model, requests, estimator="confidence")) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
def test_sliding_windows_count_positions_of_the_request(attention):
    model, plain = with_plain("mistral", attention=attention, window=3)
    requests = requests_of(LENGTHS)
    expected = [plain.chain(*request) for request in requests]
    assert values(log_likelihoods(model, requests, estimator="ar_ftb")) == pytest.approx(expected, rel=1e-4)


def test_rotary_embeddings_may_depend_on_the_length_of_a_request():
    """Dynamic NTK scaling: rows of up to 8 tokens rotate alike, each longer one by its own length."""
    rope = dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)
    model, plain = with_plain("llama", max_position_embeddings=8, rope_parameters=rope)
    requests = requests_of(LENGTHS)
    expected = [plain.chain(*request) for request in requests]
    estimates = log_likelihoods(model, requests, estimator="ar_ftb")
    assert values(estimates) == pytest.approx(expected, rel=1e-4)


# ---- what estimators expect over their randomness ----------------------------------------------------------
REPEATS = 2000


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
@pytest.mark.parametrize("samples", [1, 3, 5])
def test_the_expectation_of_a_bound_is_the_exact_bound(attention, samples):
    model, plain = with_plain(attention=attention)
    request = requests_of([(3, 5)])[0]
    drawn = values(log_likelihoods(model, [request] * REPEATS, samples=samples))
    error = np.std(drawn) / math.sqrt(REPEATS)
    assert np.mean(drawn) == pytest.approx(plain.bound(*request), abs=4 * error)
    assert error < 0.02 * abs(plain.bound(*request))


def test_the_bound_is_below_the_likelihood():
    """Of a model whose conditionals are those of one distribution: a target of one token, and the mean over
    all orders of the chain rule."""
    model, plain = with_plain()
    (context, target), one = requests_of([(3, 3), (5, 1)])
    assert log_likelihoods(model, [one])[0].log_likelihood == pytest.approx(plain.bound(*one), rel=1e-5)
    orders = []
    for order in itertools.permutations(range(3, 6)):
        hidden, total = set(order), 0.0
        for place in order:
            scores = zip(sorted(hidden), plain.masked_log_p([*context, *target], hidden), strict=True)
            total += dict(scores)[place]
            hidden.remove(place)
        orders.append(total)
    assert plain.bound(context, target) == pytest.approx(np.mean(orders))


@pytest.mark.parametrize("samples", [16, 40])
def test_the_standard_error_is_the_spread_of_estimates(samples):
    model, _ = with_plain()
    estimates = log_likelihoods(model, requests_of([(3, 5)]) * REPEATS, samples=samples)
    variance = np.mean([estimate.standard_error**2 for estimate in estimates])
    assert variance == pytest.approx(np.var(values(estimates)), rel=0.15)


def test_the_standard_error_of_few_samples_errs_on_the_safe_side():
    model, _ = with_plain()
    estimates = log_likelihoods(model, requests_of([(3, 5)]) * REPEATS, samples=4)
    variance = np.mean([estimate.standard_error**2 for estimate in estimates])
    assert 0.9 < variance / np.var(values(estimates)) < 4


def test_the_standard_error_of_one_sample_is_unknown():
    model, _ = with_plain()
    two, one = log_likelihoods(model, requests_of([(3, 2), (3, 1)]), samples=1)
    assert math.isnan(two.standard_error) and one.standard_error == 0


def test_blocks_have_errors_of_their_own():
    model, _ = with_plain(attention="block_causal")
    (context, target) = requests_of([(4, 8)])[0]
    whole = log_likelihoods(model, [(context, target)] * REPEATS, samples=16)
    variance = np.mean([estimate.standard_error**2 for estimate in whole])
    assert variance == pytest.approx(np.var(values(whole)), rel=0.15)


# ---- greedy decoding ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
@pytest.mark.parametrize("shift", [False, True])
def test_greedy_is_what_the_sampler_fills_in(attention, shift):
    model, plain = with_plain(attention=attention, shift=shift)
    requests = requests_of([pair for pair in LENGTHS if pair[0]])
    canvases = [[*context, *[MASK] * len(target)] for context, target in requests]
    block_size = BLOCK if attention == "block_causal" else max(map(len, canvases))
    filled = dk.infill(model, canvases, block_size=block_size).sequences.tolist()
    generated, others = [], []
    for (context, target), row in zip(requests, filled, strict=True):
        end = len(context) + len(target)
        generated.append((context, row[len(context) : end]))
        others.append((context, [*row[len(context) : end - 1], row[end - 1] % 40 + 4]))
    for estimator in ("auto", "confidence"):
        options = dict(samples=1, check_greedy=True, estimator=estimator)
        assert all(estimate.is_greedy for estimate in log_likelihoods(model, generated, **options))
        assert not any(estimate.is_greedy for estimate in log_likelihoods(model, others, **options))
    assert all(plain.revealed(*request)[1] for request in generated)


def test_greedy_is_not_said_unless_asked_for():
    model, _ = with_plain()
    assert [estimate.is_greedy for estimate in log_likelihoods(model, requests_of([(2, 2)]))] == [None]
