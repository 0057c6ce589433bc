"""linear_token_stats: token_stats of a projection whose logits are never stored."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_kernels as dk
from dllm_kernels.ops.reference import unmask as reference
from dllm_kernels.ops.token_stats import chunked_linear_token_stats
from tests.ops.instruction_set_helpers import results_of_each
from tests.ops.test_token_stats import DTYPES, assert_equal, random_logits


def projection(seed, rows, hidden_size, vocabulary, dtype=torch.float32, hidden_dtype=None, bias=False):
    hidden = random_logits(seed, rows, hidden_size, dtype=hidden_dtype or dtype, scale=1.0)
    weight = random_logits(seed + 1, vocabulary, hidden_size, dtype=dtype, scale=3 / math.sqrt(hidden_size))
    return hidden, weight, random_logits(seed + 2, vocabulary, dtype=dtype) if bias else None


def assert_agrees(hidden, weight, bias=None, tolerance=1e-5, **options) -> dk.TokenStats:
    """Statistics near the reference's on float64 logits; tokens equal but for two scores within 1e-4."""
    got = dk.linear_token_stats(hidden, weight, bias, **options)
    options.pop("precision", None)
    token, *reals = reference.linear_token_stats(hidden, weight, bias, **options)
    logits = (hidden.double() @ weight.double().T + (0 if bias is None else bias.double())).flatten(0, -2)
    noise = {name: options[name] for name in ("temperature", "seed", "noise_ids") if name in options}
    score = reference.scores(logits, **noise)
    differ = got.token != token
    gap = (score.gather(1, got.token.reshape(-1, 1)) - score.gather(1, token.reshape(-1, 1))).abs()
    assert bool((gap < 1e-4).all()) and int(differ.sum()) <= len(score) // 20 + 1
    for name, value in zip(("prob", "margin", "entropy", "logsumexp"), reals, strict=True):
        torch.testing.assert_close(
            getattr(got, name)[~differ].double(), value[~differ], rtol=tolerance, atol=tolerance
        )
    return got


@settings(max_examples=60)
@given(
    rows=st.integers(0, 70),
    hidden_size=st.sampled_from([1, 7, 64, 128, 130, 300]),
    vocabulary=st.integers(1, 1600),
    dtype=st.sampled_from(DTYPES),
    hidden_dtype=st.sampled_from([None, torch.float32]),
    bias=st.booleans(),
    temperature=st.sampled_from([0.0, 0.7]),
    confidence_temperature=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_agrees_with_the_reference(
    rows,
    hidden_size,
    vocabulary,
    dtype,
    hidden_dtype,
    bias,
    temperature,
    confidence_temperature,
    seed,
    data,
):
    ids = st.lists(st.integers(0, vocabulary - 1), max_size=min(4, (vocabulary - 1) // 2))
    assert_agrees(
        *projection(seed % 1000, rows, hidden_size, vocabulary, dtype, hidden_dtype, bias),
        temperature=temperature,
        seed=seed,
        suppress_tokens=data.draw(ids),
        proposal_exclude=data.draw(ids),
        confidence_exclude=data.draw(ids),
        confidence_temperature=confidence_temperature,
    )


def test_many_rows_and_a_float64_softmax():
    assert_agrees(*projection(0, 200, 96, 3000), temperature=1.0)
    got = assert_agrees(*projection(0, 3, 96, 3000, bias=True), precision="float64")
    assert got.prob.dtype == torch.float64


def test_float64_adds_no_error_of_its_own():
    """With products that are exact in float32, the softmax is exact to double."""
    weight = torch.randint(-8, 8, (3000, 4)) / 4
    assert_agrees(torch.eye(4), weight, tolerance=1e-12, precision="float64")


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 2, 3, 7), (0, 7), (2, 0, 7)])
def test_any_leading_shape(shape):
    hidden, weight = random_logits(0, *shape), random_logits(1, 50, 7)
    assert dk.linear_token_stats(hidden, weight).token.shape == shape[:-1]
    assert_equal(
        dk.linear_token_stats(hidden, weight, temperature=0.5),
        [
            field.reshape(shape[:-1])
            for field in dk.linear_token_stats(hidden.reshape(-1, 7), weight, temperature=0.5)[:5]
        ],
    )


def test_strided_inputs():
    hidden, weight = random_logits(0, 6, 5, 40), random_logits(1, 60, 80)
    plain = dk.linear_token_stats(hidden[:, 2].contiguous(), weight[:, 10:50].contiguous())
    assert_equal(dk.linear_token_stats(hidden[:, 2], weight[:, 10:50]), plain)
    transposed = weight[:, 10:50].t().contiguous().t()
    assert_equal(dk.linear_token_stats(hidden[:, 2], transposed, torch.zeros(120)[::2]), plain)


def test_noise_is_that_of_token_stats():
    """With hidden states of 0 the proposal is the argmax of the noise alone."""
    ids = torch.tensor([[7, 3, 11], [-1, 2**31 - 1, 0]], dtype=torch.int32)
    options = {"temperature": 1.0, "seed": 5, "noise_ids": ids}
    got = dk.linear_token_stats(torch.zeros(2, 8), torch.ones(4099, 8), **options)
    assert torch.equal(got.token, dk.token_stats(torch.zeros(2, 4099), **options).token)


def test_a_row_is_the_same_alone_and_in_any_batch():
    hidden, weight, _ = projection(3, 130, 200, 5000)
    ids = torch.randint(0, 1000, (130, 3), dtype=torch.int32)
    together = dk.linear_token_stats(hidden, weight, temperature=0.7, noise_ids=ids)
    for rows in (slice(0, 1), slice(5, 14), slice(40, 60), slice(63, 130)):
        some = dk.linear_token_stats(hidden[rows], weight, temperature=0.7, noise_ids=ids[rows])
        assert_equal(some, [field[rows] for field in together[:5]])


def test_the_number_of_threads_changes_nothing():
    hidden, weight, _ = projection(4, 70, 100, 9000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(dk.linear_token_stats(hidden, weight, temperature=1.0, seed=2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_equal(results[0], other)


ON_EACH = """
import dllm_kernels as dk
generator = torch.Generator().manual_seed(0)
results = []
for vocabulary in (1, 90, 5000):
    hidden, weight = (torch.randn(n, 200, generator=generator) / 4 for n in (37, vocabulary))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for temperature in (0.0, 0.9):
            results.append([*dk.linear_token_stats(hidden, weight.to(dtype), temperature=temperature)[:5]])
"""


def test_every_instruction_set_agrees(tmp_path):
    results = list(results_of_each(ON_EACH, tmp_path).values())
    for other in results[1:]:
        for expected, got in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_not_a_number_in_the_weight_bars_its_token():
    hidden, weight, _ = projection(0, 4, 20, 100)
    weight[3] = math.nan
    expected = dk.linear_token_stats(hidden, weight.nan_to_num(0.0), suppress_tokens=[3])
    assert_equal(dk.linear_token_stats(hidden, weight), expected)


def test_the_library_product_in_chunks_agrees(monkeypatch):
    """The path of CUDA, here on the CPU's library."""
    monkeypatch.setattr("dllm_kernels.ops.token_stats.CHUNK_LOGITS", 2500)
    hidden, weight, bias = projection(0, 7, 20, 1000, bias=True)
    for temperature in (0.0, 0.8):
        got = chunked_linear_token_stats(hidden[:, None], weight, bias, temperature, 3)
        expected = dk.linear_token_stats(hidden[:, None], weight, bias, temperature=temperature, seed=3)
        assert torch.equal(got[0], expected.token)
        torch.testing.assert_close(got[1:], tuple(expected[1:5]), rtol=1e-5, atol=1e-5)


# ---- torch.compile, opcheck, bad input -----------------------------------------------------------


@pytest.mark.parametrize(
    "args, kwargs",
    [
        (projection(0, 3, 16, 50), {}),
        (projection(0, 3, 16, 50, bias=True), {"temperature": 1.0, "seed": 3, "float64": True}),
        (projection(0, 0, 16, 50, torch.bfloat16), {"suppress_tokens": [1]}),
        ((random_logits(0, 16, 3).t(), random_logits(0, 16, 50).t()), {}),
        ((random_logits(0, 3, 16), random_logits(0, 50, 16)), {"confidence_exclude": [3]}),
    ],
)
def test_opcheck(args, kwargs):
    torch.library.opcheck(torch.ops.dllm_kernels.linear_token_stats, args, kwargs)


def test_compiles_without_graph_breaks():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def confident(hidden, weight):
        stats = dk.linear_token_stats(hidden * 2, weight, temperature=0.5, seed=1, suppress_tokens=[3])
        return stats.token, stats.prob + 1

    for rows in (2, 5):
        hidden, weight, _ = projection(rows, rows, 16, 40)
        stats = dk.linear_token_stats(hidden * 2, weight, temperature=0.5, seed=1, suppress_tokens=[3])
        token, prob = confident(hidden, weight)
        assert torch.equal(token, stats.token) and torch.equal(prob, stats.prob + 1)


BAD = [
    ({"hidden": torch.zeros(2, 4, dtype=torch.float64)}, "hidden must be float32 or bfloat16 or float16"),
    ({"hidden": torch.tensor(1.0)}, r"hidden must be \[..., hidden_size\]"),
    ({"weight": torch.zeros(5)}, r"weight must be \[vocabulary, hidden_size\], got shape \[5\]"),
    ({"weight": torch.zeros(5, 3)}, r"weight.shape\[1\] must be 4 \(the hidden size of hidden\)"),
    ({"weight": torch.zeros(5, 4, dtype=torch.int64)}, "weight must be float32 or bfloat16 or float16"),
    ({"weight": torch.zeros(0, 4)}, r"weight must have a vocabulary of 1 to 2\^30 ids, got 0"),
    ({"weight": torch.zeros(1, 1).expand(2**31, 4)}, r"of 1 to 2\^30 ids, got 2147483648"),
    ({"hidden": torch.zeros(2, 0), "weight": torch.zeros(5, 0)}, "the hidden size must be positive"),
    ({"bias": torch.zeros(4)}, r"bias.shape\[0\] must be 5 \(the vocabulary of weight\)"),
    ({"bias": torch.zeros(5, 1)}, r"bias must be \[vocabulary\]"),
    ({"temperature": -1.0}, "temperature must be a finite number >= 0, got -1"),
    ({"suppress_tokens": [5]}, "suppress_tokens must lie between 0 and 4, got 5"),
    ({"noise_ids": torch.zeros(3, 3, dtype=torch.int32)}, r"noise_ids must be \[2, 3\] .* of hidden\)"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_input_is_named(options, message):
    options = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), **options}
    for function in (dk.linear_token_stats, torch.ops.dllm_kernels.linear_token_stats):
        with pytest.raises(ValueError, match=f"linear_token_stats: .*{message}"):
            function(**options)


@pytest.mark.parametrize("name, value", [("top_p", 0.9), ("top_k", 5), ("previous", torch.zeros(2, 5))])
def test_what_needs_stored_logits_is_refused(name, value):
    with pytest.raises(ValueError, match=f"linear_token_stats: {name} needs stored logits"):
        dk.linear_token_stats(torch.zeros(2, 4), torch.zeros(5, 4), **{name: value})


def test_an_unknown_precision_is_refused():
    with pytest.raises(
        ValueError, match="linear_token_stats: precision is 'half'; allowed: float32, float64"
    ):
        dk.linear_token_stats(torch.zeros(2, 4), torch.zeros(5, 4), precision="half")


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_packed_weights_give_the_statistics_of_their_logits(rows_at_once, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(rows, 40, generator=generator) for rows in (7, 90))
    bias, noise_ids = torch.randn(90, generator=generator), torch.arange(21).view(7, 3).int()
    monkeypatch.setattr("dllm_kernels.ops.token_stats.CHUNK_LOGITS", 90 * rows_at_once)
    for packed in (dk.pack_weight(weight), dk.pack_weight(*dk.quantize_weight(weight))):
        options = dict(temperature=0.7, seed=3, suppress_tokens=torch.tensor([4]), noise_ids=noise_ids)
        got = dk.linear_token_stats(hidden, packed, bias, **options)
        expected = dk.token_stats(dk.skinny_linear(hidden, packed, bias), **options)
        for mine, theirs in zip(got[:5], expected[:5], strict=True):
            assert mine.equal(theirs)
        without = dk.linear_token_stats(hidden.view(7, 1, 40), packed, bias, temperature=0.7, seed=3)
        assert without.token.flatten().equal(
            dk.token_stats(dk.skinny_linear(hidden, packed, bias), temperature=0.7, seed=3).token
        )
    with pytest.raises(ValueError, match="top_k needs stored logits"):
        dk.linear_token_stats(hidden, packed, top_k=4)
