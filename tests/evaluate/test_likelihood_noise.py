"""Masks of likelihood estimates: uniform, evenly spread, and the same wherever they are drawn."""

import itertools
from collections import Counter

import numpy as np
import pytest

from dllm_train.evaluate.likelihood import log_likelihoods
from dllm_train.evaluate.masks import masked_counts, masked_targets
from tests.evaluate.test_likelihood import requests_of, values
from tests.evaluate.tiny_diffusion import marked, with_plain

IDS = range(6000)


@pytest.mark.parametrize("length, samples", [(3, 2), (5, 4), (4, 9)])
def test_every_sample_masks_every_number_of_tokens_alike(length, samples):
    counts = np.stack([masked_counts(length, samples, seed=1, request_id=index) for index in IDS])
    for sample in range(samples):
        drawn = np.bincount(counts[:, sample], minlength=length + 1)[1:]
        assert drawn == pytest.approx([len(IDS) / length] * length, abs=4 * np.sqrt(len(IDS) / length))


def test_samples_of_a_request_are_spread_evenly():
    for index in range(50):
        number = Counter(masked_counts(5, 12, seed=0, request_id=index).tolist())
        assert sorted(number) == [1, 2, 3, 4, 5] and set(number.values()) <= {2, 3}


def test_all_masks_of_one_size_are_alike():
    drawn = Counter()
    for index in IDS:
        masked = masked_targets(np.array([2]), 4, seed=3, request_id=index)[0]
        drawn[tuple(np.flatnonzero(masked))] += 1
    assert set(drawn) == set(itertools.combinations(range(4), 2))
    assert list(drawn.values()) == pytest.approx([len(IDS) / 6] * 6, abs=4 * np.sqrt(len(IDS) / 6))


def test_masks_have_the_numbers_asked_for():
    counts = np.array([1, 9, 4, 7])
    assert masked_targets(counts, 9, seed=3, request_id=8).sum(1).tolist() == counts.tolist()


def test_masks_depend_on_seed_request_place_and_sample():
    key = dict(seed=2**40 + 1, request_id=2**32 - 1, place=5)
    counts = np.full(2, 8)
    masked = masked_targets(counts, 16, **key)
    assert (masked == masked_targets(counts, 16, **key)).all()
    assert (masked[0] != masked[1]).any()
    for name in key:
        assert (masked != masked_targets(counts, 16, **key | {name: key[name] - 1})).any()
    assert (masked[:1] == masked_targets(counts[:1], 16, **key)).all()


def test_parity_with_llada_follows_its_biased_rounding():
    """k_j = round half to even of k_0 + j L / n, as torch.round(torch.linspace(...)) gives it."""
    length, samples = 3, 2
    drawn = {
        tuple(masked_counts(length, samples, seed=0, request_id=index, parity="llada").tolist())
        for index in range(100)
    }
    assert drawn == {(1, 2), (2, 1), (3, 1)}  # from 2.5, 3.5 and 4.5: a second sample never masks all
    model, plain = with_plain()
    context, target = requests_of([(2, length)])[0]
    mean_of_size = {}
    for size in range(1, length + 1):
        masks = list(itertools.combinations(range(2, 2 + length), size))
        scores = [sum(plain.masked_log_p([*context, *target], set(mask))) for mask in masks]
        mean_of_size[size] = np.mean(scores) * length / size
    expected = np.mean([mean_of_size[count] for pair in drawn for count in pair])
    biased = values(log_likelihoods(model, [(context, target)] * 2000, samples=samples, parity="llada"))
    assert np.mean(biased) == pytest.approx(expected, abs=4 * np.std(biased) / np.sqrt(len(biased)))


def test_parity_is_of_the_monte_carlo_bound():
    requests = requests_of([(2, 3)])
    with pytest.raises(ValueError, match="parity is 'dream'; allowed: None, 'llada'"):
        log_likelihoods(marked(), requests, parity="dream")
    with pytest.raises(ValueError, match="concerns estimator='monte_carlo'; this one is 'block'"):
        log_likelihoods(marked(attention="block_causal"), requests, parity="llada")
