"""Schedules, and times and masks that depend on nothing but their key."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_train.noise import Schedule, philox4x32, sample_noise


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_weight_is_minus_the_derivative_of_alpha_over_the_mask_probability(name):
    schedule, h = Schedule(name), 1e-5
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    derivative = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    torch.testing.assert_close(
        schedule.weight(t), -derivative / (1 - schedule.alpha(t)), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_alpha_goes_from_one_to_zero(name):
    ends = Schedule(name).alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_float32_weights_of_small_times_keep_their_digits(name):
    t = torch.tensor([1e-3, 1e-2, 0.5])
    torch.testing.assert_close(
        Schedule(name).weight(t), Schedule(name).weight(t.double()).float(), rtol=3e-7, atol=0
    )


def test_weight_eps_is_added_to_the_denominator():
    t = torch.tensor([1e-3])
    torch.testing.assert_close(Schedule().weight(t, eps=1e-6), torch.tensor([1 / (1e-3 + 1e-6)]))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123's kat_vectors
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    assert philox4x32(np.array(counter, dtype=np.uint32), key).tolist() == expected


@given(
    rows=st.integers(1, 7),
    length=st.integers(1, 40),
    block_size=st.none() | st.integers(1, 9),
    stratified=st.booleans(),
    cut=st.integers(0, 7),
)
def test_noise_of_an_example_does_not_depend_on_its_batch(rows, length, block_size, stratified, cut):
    labels, ids = torch.zeros(rows, length, dtype=torch.int64), [11 * i + 3 for i in range(rows)]
    options = dict(seed=5, epoch=2, block_size=block_size, stratified=stratified)
    whole = sample_noise(labels, ids, **options)
    parts = [sample_noise(labels[s], ids[s], **options) for s in (slice(0, cut), slice(cut, None)) if ids[s]]
    assert torch.equal(whole.t, torch.cat([p.t for p in parts]))
    assert torch.equal(whole.masked, torch.cat([p.masked for p in parts]))


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"example_ids": range(64, 128)}])
def test_another_key_gives_other_noise(change):
    labels = torch.zeros(64, 32, dtype=torch.int64)
    first = sample_noise(labels, range(64))
    second = sample_noise(labels, **({"example_ids": range(64)} | change))
    assert not torch.equal(first.t, second.t)
    assert not torch.equal(first.masked, second.masked)


def test_masks_appear_with_probability_one_minus_alpha():
    labels = torch.zeros(4000, 32, dtype=torch.int64)
    noise = sample_noise(labels, range(4000), schedule="cosine", stratified=False)
    expected = 1 - Schedule("cosine").alpha(noise.t)
    deviation = (noise.masked.float() - expected).mean(1)  # per row; standard deviation below 0.5 / sqrt(32)
    assert abs(float(deviation.mean())) < 4 * 0.5 / (4000 * 32) ** 0.5


def test_times_lie_between_eps_and_one_and_are_shared_by_row_or_block():
    labels = torch.zeros(500, 10, dtype=torch.int64)
    noise = sample_noise(labels, range(500), eps=0.2, block_size=4)
    assert 0.2 <= float(noise.t.min()) < 0.21
    assert 0.99 < float(noise.t.max()) < 1
    assert torch.equal(noise.t[:, 0], noise.t[:, 3])
    assert torch.equal(noise.t[:, 8], noise.t[:, 9])
    assert not torch.equal(noise.t[:, 3], noise.t[:, 4])
    per_row = sample_noise(labels, range(500)).t
    assert torch.equal(per_row, per_row[:, :1].expand_as(per_row))


def test_stratified_times_of_consecutive_examples_are_spread_evenly():
    t = sample_noise(torch.zeros(100, 1, dtype=torch.int64), range(700, 800)).t[:, 0].sort().values
    gaps = torch.diff(t)
    assert float(gaps.max()) < 2 / 100


def test_given_tokens_are_never_masked():
    labels = torch.zeros(50, 20, dtype=torch.int64)
    labels[:, ::2] = -100
    assert not sample_noise(labels, range(50)).masked[:, ::2].any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("schedule", {"schedule": "quadratic"}),
        ("eps", {"eps": 0.0}),
        ("block_size", {"block_size": 0}),
        ("example_ids", {"example_ids": [1]}),
    ],
)
def test_bad_arguments_are_named(name, options):
    with pytest.raises(ValueError, match=name):
        sample_noise(torch.zeros(2, 4, dtype=torch.int64), **({"example_ids": [0, 1]} | options))
