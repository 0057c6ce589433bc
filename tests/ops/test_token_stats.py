import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_kernels as dk
from dllm_kernels.ops.reference import unmask as reference
from tests.ops.instruction_set_helpers import results_of_each

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_logits(seed: int, *shape: int, dtype=torch.float32, scale=3.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_agrees(logits: torch.Tensor, tolerance: float = 2e-6, **options) -> dk.TokenStats:
    """Statistics near the reference's; tokens equal but for two noised scores within 1e-4."""
    got = dk.token_stats(logits, **options)
    options.pop("precision", None)
    token, *reals = reference.token_stats(logits, **options)
    noise = {name: options[name] for name in ("temperature", "seed", "noise_ids") if name in options}
    score = reference.scores(logits, **noise)
    differ = got.token != token
    gap = (score.gather(1, got.token.reshape(-1, 1)) - score.gather(1, token.reshape(-1, 1))).abs()
    assert bool((gap[differ.reshape(-1)] < 1e-4).all())
    assert int(differ.sum()) <= (len(score) // 100 + 1 if options.get("temperature", 0) else 0)
    assert got.divergence is None
    for name, value in zip(("prob", "margin", "entropy", "logsumexp"), reals, strict=True):
        torch.testing.assert_close(
            getattr(got, name)[~differ].double(), value[~differ], rtol=tolerance, atol=tolerance
        )
    return got


def assert_equal(stats, expected) -> None:
    """Bitwise equal fields, divergence aside."""
    assert all(torch.equal(a, b) for a, b in zip(stats[:5], expected[:5], strict=True))


# ---- Philox and the noise ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, words",
    [  # Random123's known answers for philox4x32, 10 rounds
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_reference_philox_gives_the_known_answers(counter, key, words):
    assert reference.philox4x32_10(np.array(counter, dtype=np.uint32), key).tolist() == words


def test_noise_stays_finite_at_both_ends():
    ends = reference.gumbel(np.array([0, 1, 2**32 - 1], dtype=np.uint32))
    assert np.isfinite(ends).all() and ends[0] > 22.8 and ends[2] < -3.1


def test_noise_follows_the_published_counter():
    """With all logits equal the proposal is the argmax of the noise alone."""
    ids = torch.tensor([[7, 3, 11], [-1, 2**31 - 1, 0], [0, 0, 0]], dtype=torch.int32)
    for seed in (0, 1, 2**40 + 5, -3):
        got = dk.token_stats(torch.zeros(3, 4099), temperature=1.0, seed=seed, noise_ids=ids)
        expected = [int(reference.token_noise(4099, seed, *row).argmax()) for row in ids.tolist()]
        assert got.token.tolist() == expected


def test_sampled_tokens_follow_the_softmax():
    """Chi-square over 20,000 draws of 8 tokens; the seed is fixed, so this is a fact, not a chance."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.5, -2.0, 1.5])
    n, temperature = 20_000, 0.8
    token = dk.token_stats(logits.expand(n, 8), temperature=temperature, seed=1).token
    expected = (logits / temperature).softmax(0) * n
    chi_square = float(((token.bincount(minlength=8) - expected) ** 2 / expected).sum())
    assert chi_square < 24.3  # 99.9% point, 7 degrees of freedom


# ---- agreement with the reference ----------------------------------------------------------------


@settings(max_examples=60)
@given(
    rows=st.integers(0, 5),
    vocabulary=st.integers(1, 2100),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    confidence_temperature=st.sampled_from([1.0, 0.5, 2.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    data=st.data(),
)
def test_agrees_with_the_reference(rows, vocabulary, dtype, temperature, confidence_temperature, seed, data):
    ids = st.lists(st.integers(0, vocabulary - 1), max_size=min(4, (vocabulary - 1) // 2))
    assert_agrees(
        random_logits(seed % 1000, rows, vocabulary, dtype=dtype),
        temperature=temperature,
        seed=seed,
        suppress_tokens=data.draw(ids),
        proposal_exclude=data.draw(ids),
        confidence_exclude=data.draw(ids),
        confidence_temperature=confidence_temperature,
    )


@pytest.mark.parametrize("vocabulary", [65_535, 65_536, 65_537, 126_464, 262_144])
def test_agrees_on_large_vocabularies(vocabulary):
    logits = random_logits(vocabulary, 2, vocabulary)
    assert_agrees(logits, tolerance=5e-6, suppress_tokens=[vocabulary - 1])
    assert_agrees(logits, tolerance=5e-6, temperature=1.0)


def test_float64_is_exact_to_double():
    got = assert_agrees(random_logits(0, 4, 3000), tolerance=1e-12, precision="float64")
    assert got.prob.dtype == torch.float64


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 2, 3, 7), (0, 7), (2, 0, 7)])
def test_any_leading_shape(shape):
    assert assert_agrees(random_logits(0, *shape)).token.shape == shape[:-1]


def test_strided_logits_read_in_place():
    whole = random_logits(1, 3, 10, 50)
    for view in (
        whole[:, 2:6],
        whole[:, ::2],
        whole.transpose(0, 1),
        whole[..., 5:30],
        whole.transpose(1, 2),
        whole[0].expand(4, 10, 50),
    ):
        contiguous = dk.token_stats(view.contiguous(), temperature=0.5, seed=3)
        assert_equal(dk.token_stats(view, temperature=0.5, seed=3), contiguous)


# ---- defined results for odd rows ----------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [3, 17, 1025, 70_000])
def test_ties_go_to_the_lowest_id(vocabulary):
    logits = torch.zeros(1, vocabulary)
    assert dk.token_stats(logits).token.item() == 0
    assert dk.token_stats(logits).margin.item() == 0
    logits[0, [vocabulary // 2, vocabulary - 1]] = 1.0
    assert dk.token_stats(logits).token.item() == vocabulary // 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_row_without_a_finite_logit_yields_the_lowest_allowed_id(value, temperature):
    logits = torch.full((2, 100), value)
    got = dk.token_stats(logits, temperature=temperature, suppress_tokens=[0], proposal_exclude=[1])
    assert got.token.tolist() == [2, 2]
    assert got.prob.tolist() == [0, 0] and got.margin.tolist() == [0, 0]
    assert got.entropy.tolist() == pytest.approx([math.log(100)] * 2)
    assert got.logsumexp.tolist() == [-math.inf] * 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_counts_as_minus_infinity(temperature):
    logits = random_logits(3, 4, 1000)
    clean = logits.clone()
    logits[:, ::7], clean[:, ::7] = math.nan, -math.inf
    got = dk.token_stats(logits, temperature=temperature)
    expected = dk.token_stats(clean, temperature=temperature)
    assert_equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plus_infinity_wins_and_shares(dtype):
    logits = torch.zeros(2, 50, dtype=dtype)
    logits[0, 9] = logits[1, 8] = logits[1, 20] = math.inf
    got = dk.token_stats(logits)
    assert got.token.tolist() == [9, 8]
    assert got.prob.tolist() == [1, 0.5] and got.margin.tolist() == [1, 0]
    assert bool(got.entropy.isfinite().all())


def test_a_proposal_left_out_of_the_softmax_has_confidence_zero():
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    got = dk.token_stats(logits, confidence_exclude=[0])
    assert got.token.item() == 0 and got.prob.item() == 0 and got.margin.item() == 0
    kept = dk.token_stats(logits, proposal_exclude=[0])
    assert kept.token.item() == 1
    assert kept.prob.item() == pytest.approx(math.e / (math.e**5 + math.e + 1))


# ---- the draw depends on nothing else ------------------------------------------------------------


def test_a_row_is_the_same_alone_and_in_any_batch():
    logits = random_logits(5, 6, 70_001)
    ids = torch.randint(0, 1000, (6, 3), dtype=torch.int32)
    together = dk.token_stats(logits, temperature=0.7, seed=9, noise_ids=ids)
    for row in range(6):
        one = slice(row, row + 1)
        alone = dk.token_stats(logits[one], temperature=0.7, seed=9, noise_ids=ids[one])
        assert_equal(alone, [field[one] for field in together[:5]])


def test_the_number_of_threads_changes_nothing():
    logits = random_logits(6, 3, 140_000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(dk.token_stats(logits, temperature=1.0, seed=2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_equal(results[0], other)


ON_EACH = """
import dllm_kernels as dk
generator = torch.Generator().manual_seed(0)
results = []
for vocabulary in (1, 7, 33, 90, 513, 70_001):
    logits = torch.randn(4, vocabulary, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for options in ({}, {"temperature": 0.9}, {"confidence_temperature": 0.7, "top_p": 0.9}):
            results.append([*dk.token_stats(logits.to(dtype), **options)[:5]])
"""


def test_every_instruction_set_gives_the_same_tokens(tmp_path):
    results = list(results_of_each(ON_EACH, tmp_path).values())
    for other in results[1:]:
        for expected, got in zip(results[0], other, strict=True):
            assert torch.equal(got[0], expected[0])
            torch.testing.assert_close(got[1:], expected[1:], rtol=1e-6, atol=1e-6)


# ---- torch.compile, opcheck, bad input -----------------------------------------------------------

OPCHECK_CASES = [
    ((random_logits(0, 3, 50),), {}),
    ((random_logits(0, 2, 3, 50).transpose(0, 1),), {"temperature": 1.0, "seed": 3, "float64": True}),
    ((random_logits(0, 0, 50, dtype=torch.bfloat16),), {"suppress_tokens": [1]}),
    ((random_logits(0, 3, 50),), {"top_p": 0.8, "top_k": 5}),
    (
        (random_logits(0, 2, 50), 0.5, 1, [2]),
        {"confidence_exclude": [3], "noise_ids": torch.ones(2, 3, dtype=torch.int32)},
    ),
]


@pytest.mark.parametrize("args, kwargs", OPCHECK_CASES)
def test_opcheck(args, kwargs):
    torch.library.opcheck(torch.ops.dllm_kernels.token_stats, args, kwargs)


def test_compiles_without_graph_breaks():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def confident(logits):
        stats = dk.token_stats(logits * 2, temperature=0.5, seed=1, suppress_tokens=[3])
        return stats.token, stats.prob + 1

    for rows in (2, 5):
        logits = random_logits(rows, rows, 40)
        stats = dk.token_stats(logits * 2, temperature=0.5, seed=1, suppress_tokens=[3])
        token, prob = confident(logits)
        assert torch.equal(token, stats.token) and torch.equal(prob, stats.prob + 1)


BAD = [
    (
        {"logits": torch.zeros(2, 5, dtype=torch.int64)},
        "logits must be float32 or bfloat16 or float16, got int64",
    ),
    ({"logits": torch.tensor(1.0)}, r"logits must be \[..., vocabulary\]"),
    ({"logits": torch.zeros(2, 0)}, r"logits must have a vocabulary of 1 to 2\^30 ids, got 0"),
    ({"logits": torch.zeros(1).expand(1, 2**31)}, r"of 1 to 2\^30 ids, got 2147483648"),
    ({"temperature": -1.0}, "temperature must be a finite number >= 0, got -1"),
    ({"temperature": math.nan}, "temperature must be a finite number"),
    ({"confidence_temperature": 0.0}, "confidence_temperature must be a finite number > 0"),
    ({"suppress_tokens": [5]}, "suppress_tokens must lie between 0 and 4, got 5"),
    ({"proposal_exclude": [-1]}, "proposal_exclude must lie between 0 and 4, got -1"),
    ({"suppress_tokens": [0, 1, 2], "proposal_exclude": [3, 4]}, "leave no token to propose"),
    ({"top_p": 1.5}, "top_p must be None or lie between 0 and 1, got 1.5"),
    ({"top_p": math.nan}, "top_p must be None or lie between 0 and 1"),
    ({"top_k": 0}, "top_k must be None or >= 1, got 0"),
    ({"noise_ids": torch.zeros(2, 3)}, "noise_ids must be int32, got float32"),
    ({"noise_ids": torch.zeros(3, 3, dtype=torch.int32)}, r"noise_ids must be \[2, 3\]"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_input_is_named(options, message):
    options = {"logits": torch.zeros(2, 5), **options}
    logits = options.pop("logits")
    for function in (dk.token_stats, torch.ops.dllm_kernels.token_stats):
        with pytest.raises(ValueError, match=message):
            function(logits, **options)


@pytest.mark.parametrize("temperature", [0.7, 3.0, 1 / 3])
def test_float64_is_right_to_float64_where_no_float32_is_the_inverse_temperature(temperature):
    logits = random_logits(5, 4, 3000)
    previous = logits + 0.1 * logits.roll(1, 1)
    options = {"confidence_temperature": temperature, "precision": "float64"}
    got = dk.token_stats(logits, previous=previous, **options)
    _, *reals = reference.token_stats(logits, confidence_temperature=temperature)
    for value, expected in zip(got[1:5], reals, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    divergence = reference.token_divergence(logits, previous, confidence_temperature=temperature)
    torch.testing.assert_close(got.divergence, divergence, rtol=1e-12, atol=0)
    linear = dk.linear_token_stats(logits, torch.eye(3000), **options)  # the same logits
    for value, expected in zip(linear[1:5], reals, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
