"""linear_token_stats on the GPU against the CPU operator, which sums in float32 too: the kernel of Hopper,
and the library's product elsewhere."""

import math

import pytest
import torch

import dllm_kernels as dk

DTYPES = [torch.bfloat16, torch.float16]
hopper, hardware = pytest.mark.hopper, pytest.mark.hardware


def projection(seed, rows, hidden_size, vocabulary, dtype=torch.bfloat16, bias_dtype=None):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=g).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size, generator=g) * 3 / math.sqrt(hidden_size)).to(dtype)
    return hidden, weight, bias_dtype and torch.randn(vocabulary, generator=g).to(bias_dtype)


PRODUCTS = 16  # that one instruction adds up


def error_of_truncated_sums(hidden, weight) -> float:
    """How far a logit may lie from a rounded sum in float32: every instruction truncates the sum it adds to,
    and may so lose a unit in the last place of what stands there, always in the same direction."""
    hidden, weight = (
        torch.nn.functional.pad(x.float(), (0, -x.shape[1] % PRODUCTS)) for x in (hidden, weight)
    )
    terms = hidden.unflatten(1, (-1, PRODUCTS)), weight.unflatten(1, (-1, PRODUCTS))
    partial = torch.einsum("rsk,vsk->rvs", *terms).cumsum(-1).abs()
    largest = partial[partial.isfinite()].max() if partial.isfinite().any() else 0
    return float(hidden.shape[1] // PRODUCTS * torch.finfo(torch.float32).eps * largest)


def assert_agrees(gpu, hidden, weight, bias=None, **options):
    """Within a rounding floor and what an error of the logits makes of the softmax's."""
    expected = dk.linear_token_stats(hidden, weight, bias, **options)
    got = gpu(dk.linear_token_stats, hidden, weight, bias, **options)
    assert torch.equal(got.token, expected.token)
    error = error_of_truncated_sums(hidden, weight) / options.get("confidence_temperature", 1.0)
    # A probability changes by its double at most, where its logit and all others move apart.
    allowed = dict(prob=2 * error, margin=2 * error, entropy=2 * error * expected.entropy, logsumexp=error)
    for name, of_sums in allowed.items():
        a, b = getattr(got, name), getattr(expected, name)
        floor = 1e-4 * b.abs() + 2e-5
        assert (((a - b).abs() <= floor + of_sums) | (a == b) | (a.isnan() & b.isnan())).all(), name


@hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "vocabulary", [1, 3, 63, 64, 65, 127, 128, 129, 300, pytest.param(126_464, marks=hardware)]
)
def test_vocabularies_around_tile_borders(gpu, vocabulary, dtype):
    assert_agrees(gpu, *projection(vocabulary, 3, 64, vocabulary, dtype))
    assert_agrees(gpu, *projection(vocabulary, 3, 64, vocabulary, dtype), temperature=0.8, seed=2**40 + 3)


@hopper
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 70])
def test_any_number_of_rows(gpu, rows):
    assert_agrees(gpu, *projection(rows, rows, 72, 200))
    assert_agrees(gpu, *projection(rows, rows, 72, 200), temperature=1.0, seed=5)


@hopper
@pytest.mark.parametrize("hidden_size", [8, 56, 64, 120, 1000, pytest.param(4096, marks=hardware)])
def test_any_hidden_size_that_the_copies_can_read(gpu, hidden_size):
    assert_agrees(gpu, *projection(hidden_size, 5, hidden_size, 200, torch.float16))


@hopper
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_ranges_of_several_tiles(gpu, temperature):
    """132 ranges of three units, the last with fewer."""
    arguments = projection(1, 9, 16, 2 * 132 * 64 + 100, bias_dtype=torch.float32)
    assert_agrees(gpu, *arguments, temperature=temperature)


@hopper
@pytest.mark.parametrize("bias_dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"suppress_tokens": [0, 7, 255]},
        {"proposal_exclude": [3, 128], "temperature": 0.5},
        {"confidence_exclude": list(range(64))},
        {"confidence_temperature": 0.6},
        {"noise_ids": torch.arange(12, dtype=torch.int32).reshape(4, 3), "temperature": 1.0, "seed": -1},
    ],
)
def test_options(gpu, options, bias_dtype):
    assert_agrees(gpu, *projection(2, 4, 64, 300, bias_dtype=bias_dtype), **options)


@hopper
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_proposal_outside_the_softmax_has_no_probability(gpu, temperature):
    hidden, weight, bias = projection(3, 4, 64, 300, bias_dtype=torch.float32)
    bias[150] = 100
    got = gpu(dk.linear_token_stats, hidden, weight, bias, temperature=temperature, confidence_exclude=[150])
    assert got.token.tolist() == [150] * 4 and (got.prob == 0).all() and (got.margin == 0).all()


@hopper
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_odd_rows(gpu, temperature):
    hidden, weight, bias = projection(4, 6, 64, 300, bias_dtype=torch.float32)
    hidden[0] = math.nan
    hidden[1, 5] = math.inf
    hidden[2] = 0
    bias[::3] = -math.inf
    bias[1] = math.nan
    for some in (None, bias):
        assert_agrees(gpu, hidden, weight, some, temperature=temperature, suppress_tokens=[0])
    bias[[20, 200]] = math.inf
    got = gpu(dk.linear_token_stats, hidden[2:], weight, bias)
    assert got.token.tolist() == [20] * 4 and (got.prob == 0.5).all() and (got.margin == 0).all()


@hopper
def test_ties_keep_the_lowest_id(gpu):
    hidden, weight, _ = projection(5, 3, 64, 300)
    hidden[:] = weight[137]
    weight[[12, 70, 260]] = weight[137] * 4
    assert gpu(dk.linear_token_stats, hidden, weight).token.tolist() == [12] * 3


@hopper
@pytest.mark.parametrize(
    "rows, hidden_size, vocabulary", [(70, 128, 300), pytest.param(100, 4096, 126_464, marks=hardware)]
)
def test_a_row_is_the_same_alone_and_in_any_batch(gpu, rows, hidden_size, vocabulary):
    hidden, weight, bias = projection(6, rows, hidden_size, vocabulary, bias_dtype=torch.float32)
    ids = torch.randint(0, 1000, (rows, 3), dtype=torch.int32)
    together = gpu(dk.linear_token_stats, hidden, weight, bias, temperature=0.7, noise_ids=ids)
    for some in (slice(0, 1), slice(5, 14), slice(10, 40), slice(3, 63), slice(rows - 1, rows)):
        alone = gpu(dk.linear_token_stats, hidden[some], weight, bias, temperature=0.7, noise_ids=ids[some])
        assert all(torch.equal(a, b[some]) for a, b in zip(alone[:5], together[:5], strict=True))


@hopper
@pytest.mark.parametrize(
    "hidden_size, vocabulary, repeats", [(64, 300, 2), pytest.param(1024, 126_464, 50, marks=hardware)]
)
def test_repeats_have_the_same_bits(gpu, hidden_size, vocabulary, repeats):
    arguments = projection(7, 33, hidden_size, vocabulary)
    first = gpu(dk.linear_token_stats, *arguments, temperature=1.0)
    for _ in range(repeats):
        again = gpu(dk.linear_token_stats, *arguments, temperature=1.0)
        assert all(torch.equal(a, b) for a, b in zip(first[:5], again[:5], strict=True))


@hopper
def test_strides_and_leading_shapes(gpu):
    hidden, weight, bias = projection(8, 30, 64, 200, bias_dtype=torch.float32)
    plain = gpu(dk.linear_token_stats, hidden[::2], weight, bias)
    wide = torch.cat([weight, weight], 1)
    strided = gpu(
        dk.linear_token_stats,
        hidden.reshape(3, 10, 64)[:, ::2],
        wide[:, 64:],
        torch.stack([bias, bias], 1)[:, 1],
    )
    assert strided.token.shape == (3, 5)
    assert all(torch.equal(a.flatten(), b) for a, b in zip(strided[:5], plain[:5], strict=True))


@pytest.mark.parametrize("hidden_size", [60, 64])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"precision": "float64"}])
@pytest.mark.parametrize("generation", [pytest.param("Hopper", marks=hopper), "Ampere"])
def test_float32_takes_the_library_s_product(gpu, generation, options, hidden_size):
    hidden, weight, bias = projection(9, 4, hidden_size, 300, torch.float32, torch.float32)
    assert_agrees(gpu, hidden, weight, bias, **options)
    transposed = weight.t().contiguous().t()
    got = gpu(dk.linear_token_stats, hidden.half(), transposed, bias, **options)
    assert torch.equal(got.token, dk.linear_token_stats(hidden.half(), weight, bias, **options).token)


@pytest.mark.parametrize("generation", [pytest.param("Hopper", marks=hopper), "Ampere"])
def test_bad_input_is_named(gpu, generation):
    hidden, weight, _ = projection(10, 2, 64, 100)
    with pytest.raises(ValueError, match=r"weight.shape\[1\] must be 32"):
        gpu(dk.linear_token_stats, hidden[:, :32], weight)
    with pytest.raises(ValueError, match="suppress_tokens may list at most 64 ids on CUDA, got 65"):
        gpu(dk.linear_token_stats, hidden, weight, suppress_tokens=range(65))
