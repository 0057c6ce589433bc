"""top_p, top_k and previous of token_stats on the GPU against the CPU operators."""

import math

import pytest
import torch

import dllm_kernels as dk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
hardware = pytest.mark.hardware
LARGE = pytest.param(126_464, marks=hardware)


def random_logits(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def assert_agrees(gpu, logits: torch.Tensor, **options) -> None:
    expected = dk.token_stats(logits, **options)
    got = gpu(dk.token_stats, logits, **options)
    assert torch.equal(got.token, expected.token)
    tolerance = 1e-10 if options.get("precision") == "float64" else 1e-5
    for a, b in zip(got[1:], expected[1:], strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 33, 2001, LARGE])
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.0},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 0.7, "confidence_temperature": 0.7},
        {"top_k": 1},
        {"top_k": 50, "temperature": 1.0},
        {"top_k": 100_000, "top_p": 0.5},
        {"top_p": 0.9, "top_k": 7, "confidence_temperature": 1.3},
        {"top_p": 0.95, "precision": "float64"},
    ],
)
def test_filters_agree_with_the_cpu(gpu, options, vocabulary, dtype):
    assert_agrees(gpu, random_logits(vocabulary, 2, vocabulary, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"top_k": 30}, {"top_p": 0.3, "top_k": 40}])
def test_ties_are_cut_by_id(gpu, options, dtype):
    """Few distinct logits, both zeros among them: where the cut falls into a tie, lower ids stay."""
    g = torch.Generator().manual_seed(0)
    values = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=dtype)
    logits = values[torch.randint(0, 4, (4, 2000), generator=g)]
    logits[0] = 0.0
    for temperature in (0.0, 1.0):
        assert_agrees(gpu, logits, temperature=temperature, **options)


def test_filters_span_ranges(gpu):
    """A vocabulary of two ranges of the statistics kernels."""
    assert_agrees(gpu, random_logits(8, 2, 16_390), top_p=0.9, top_k=900, temperature=0.5)


def test_ids_are_left_out_before_and_after_the_filters(gpu):
    logits = random_logits(1, 3, 700)
    best = logits.topk(4).indices.flatten().tolist()
    for options in (
        {"suppress_tokens": best},
        {"proposal_exclude": best},
        {"confidence_exclude": best},
        {"proposal_exclude": best, "top_k": 1},  # nothing that is kept may be proposed
    ):
        assert_agrees(gpu, logits, **{"top_p": 0.8, "temperature": 0.5, **options})


@pytest.mark.parametrize("options", [{"top_p": 0.7}, {"top_k": 3}, {"top_p": 0.7, "top_k": 2}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_rows_agree_with_the_cpu(gpu, options, dtype):
    logits = random_logits(2, 6, 900, dtype=dtype)
    logits[0] = math.nan
    logits[1] = -math.inf
    logits[2, [5, 600, 800]] = math.inf
    logits[3, ::2] = math.nan
    logits[4, 1:] = -math.inf
    logits[5] = torch.finfo(dtype).min
    assert_agrees(gpu, logits, **options)


@pytest.mark.parametrize("view", [lambda x: x[:, 2:6], lambda x: x.transpose(0, 1), lambda x: x[..., 5:230]])
def test_strided_logits(gpu, view):
    now, before = (view(random_logits(seed, 3, 10, 501, dtype=torch.bfloat16)) for seed in (3, 4))
    assert_agrees(gpu, now, previous=before, top_p=0.9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 5, 2001, LARGE])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"confidence_temperature": 0.5, "suppress_tokens": [0, 3], "confidence_exclude": [2]},
        {"precision": "float64"},
    ],
)
def test_divergence_agrees_with_the_cpu(gpu, options, vocabulary, dtype):
    if vocabulary == 1:
        options = {**options, "suppress_tokens": (), "confidence_exclude": ()}
    logits = random_logits(vocabulary, 2, vocabulary, dtype=dtype)
    for distance in (0.0, 0.01, 3.0):
        previous = (logits + distance * random_logits(9, 2, vocabulary)).to(dtype)
        assert_agrees(gpu, logits, previous=previous, **options)


def test_divergence_of_odd_rows(gpu):
    now, before = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-math.inf, 2.0, 3.0]])
    nothing = torch.full((1, 3), math.nan)
    for logits, previous in ((now, before), (before, now), (now, now + 8), (nothing, now), (now, nothing)):
        assert_agrees(gpu, logits, previous=previous)


def test_divergence_from_rows_of_other_alignment(gpu):
    now, before = random_logits(0, 3, 1001), random_logits(1, 3, 1003)[:, 2:]
    assert_agrees(gpu, now, previous=before)


@pytest.mark.parametrize("options", [{"top_p": 0.6}, {"top_k": 4}, {"top_p": 0.6, "top_k": 9}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unmask_filters_as_on_the_cpu(gpu, options, temperature):
    g = torch.Generator().manual_seed(6)
    logits = random_logits(7, 3, 16, 555, dtype=torch.bfloat16)
    canvas = torch.randint(0, 5, (3, 40), generator=g)
    canvas[torch.rand(3, 40, generator=g) < 0.6] = 5
    start = torch.tensor([0, 10, 24], dtype=torch.int32)
    call = {"mask_id": 5, "block_start": start, "block_size": 16, "temperature": temperature, "seed": 3}
    expected = canvas.clone()
    accepted = gpu(dk.unmask_, canvas, logits, dk.Rule.threshold(0.3), **call, **options)
    assert torch.equal(accepted, dk.unmask_(expected, logits, dk.Rule.threshold(0.3), **call, **options))
    assert torch.equal(canvas, expected)


# ---- on a GPU only ------------------------------------------------------------------------------------
@pytest.mark.graph
def test_filters_are_captured_and_repeat_in_bits():
    logits = torch.zeros(32, 50_257, dtype=torch.bfloat16).cuda()
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 1000}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        dk.token_stats(logits, previous=logits, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dk.token_stats(logits, previous=logits, **options)
    logits.copy_(random_logits(5, 32, 50_257))
    for _ in range(5):
        graph.replay()
        again = dk.token_stats(logits, previous=logits, **options)
        assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))
