"""Diffusion losses on the GPU against the CPU's."""

import pytest
import torch

import dllm_kernels as dk

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}
hardware = pytest.mark.hardware


def random_rows(vocabulary: int, dtype, *shape: int):
    """Logits, targets and weights; rows of weight 0 hold NaN and targets outside the vocabulary."""
    g = torch.Generator().manual_seed(vocabulary)
    weights = torch.rand(*shape, generator=g) * (torch.rand(*shape, generator=g) < 0.5)
    targets = torch.randint(1 % vocabulary, vocabulary, shape, generator=g).masked_fill(weights == 0, -100)
    logits = 4 * torch.randn(*shape, vocabulary, generator=g)
    return logits.masked_fill((weights == 0)[..., None], torch.nan).to(dtype), targets, weights


def assert_close(got, expected, dtype):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    bound = TOLERANCE[dtype] * float(expected.abs().max()) if expected.numel() else 0
    torch.testing.assert_close(got, expected, rtol=0, atol=bound)


def loss_and_gradients(logits, targets, weights, suppress_tokens):
    """loss, ce, and the gradients of 0.3 · loss for logits and weights."""
    logits, weights = logits.detach().requires_grad_(), weights.detach().requires_grad_()
    loss, ce = dk.diffusion_cross_entropy(
        logits, targets, weights, suppress_tokens=suppress_tokens, return_ce=True
    )
    return loss.detach(), ce, *torch.autograd.grad(0.3 * loss, [logits, weights])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "vocabulary", [1, 3, 17, 1000, 20_003, *(pytest.param(n, marks=hardware) for n in (50_257, 126_464))]
)
def test_the_loss_of_logits_equals_the_cpu(gpu, vocabulary, dtype):
    """Odd vocabularies: rows start anywhere in a 16-byte vector."""
    suppress_tokens = [0, vocabulary // 2] if vocabulary > 17 else []
    logits, targets, weights = random_rows(vocabulary, dtype, 2, 3)
    if suppress_tokens:
        targets[targets == vocabulary // 2] = 1
    arguments = logits, targets, weights, suppress_tokens
    got, expected = gpu(loss_and_gradients, *arguments), loss_and_gradients(*arguments)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 17, 1000, 12_288, 24_576, pytest.param(126_464, marks=hardware)])
def test_logits_are_replaced_by_their_gradient(gpu, vocabulary, dtype):
    """Also rows of exactly 48 KiB, which a CTA cannot keep beside its variables without asking for more."""
    logits, targets, weights = random_rows(vocabulary, dtype, 5)
    suppress_tokens = [0] if vocabulary > 17 else []
    in_place = torch.ops.dllm_kernels.diffusion_cross_entropy_gradient_
    expected = logits.to(torch.promote_types(dtype, torch.float32), copy=True)
    loss, ce = gpu(in_place, logits, targets, weights, suppress_tokens)
    expected_loss, expected_ce = in_place(expected, targets, weights, suppress_tokens)
    assert_close(loss, expected_loss, dtype)
    assert_close(ce, expected_ce, dtype)
    assert_close(logits.to(expected.dtype), expected, dtype)


@pytest.mark.parametrize("vocabulary", [60_001, pytest.param(262_144, marks=hardware)])
def test_rows_larger_than_shared_memory_are_replaced_too(gpu, vocabulary):
    logits, targets, weights = random_rows(vocabulary, torch.float32, 2)
    weights[:] = torch.tensor([0.5, 2.0])
    logits, targets = logits.nan_to_num(0.5), targets.clamp(min=1)
    expected = logits.clone()
    in_place = torch.ops.dllm_kernels.diffusion_cross_entropy_gradient_
    loss, ce = gpu(in_place, logits, targets, weights, [7])
    expected_loss, expected_ce = in_place(expected, targets, weights, [7])
    assert_close(loss, expected_loss, torch.float32)
    assert_close(ce, expected_ce, torch.float32)
    assert_close(logits, expected, torch.float32)


@pytest.mark.parametrize("view", [lambda x: x[:, 1:4], lambda x: x.transpose(0, 1), lambda x: x[..., 3:90]])
def test_strided_logits(gpu, view):
    """Gradients are contiguous: their rows are aligned otherwise than those of the logits."""
    logits = view(torch.randn(5, 5, 101, generator=torch.Generator().manual_seed(0)))
    targets, weights = torch.full(logits.shape[:2], 2), torch.rand(logits.shape[:2])
    got = gpu(loss_and_gradients, logits, targets, weights, [])
    for a, b in zip(got, loss_and_gradients(logits, targets, weights, []), strict=True):
        assert_close(a, b, torch.float32)


def test_a_target_outside_the_vocabulary_shows_in_the_loss(gpu):
    targets, weights = torch.tensor([3, 5, 0]), torch.tensor([1.0, 1.0, 0.0])
    loss, ce = gpu(dk.diffusion_cross_entropy, torch.zeros(3, 5), targets, weights, return_ce=True)
    assert loss.isnan() and ce.isnan().tolist() == [False, True, False]
    targets[1] = 2
    loss = gpu(dk.diffusion_cross_entropy, torch.zeros(3, 5), targets, weights, suppress_tokens=[2])
    assert loss == torch.inf


def test_no_rows_have_loss_0(gpu):
    none = torch.zeros(0, dtype=torch.int64)
    assert gpu(dk.diffusion_cross_entropy, torch.zeros(0, 5), none, torch.zeros(0)) == 0
    logits, targets = torch.full((3, 5), torch.nan), torch.full((3,), -100)
    loss, ce, grad, _ = gpu(loss_and_gradients, logits, targets, torch.zeros(3), [])
    assert loss == 0 and not ce.any() and not grad.any()


def test_the_sum_does_not_depend_on_scheduling(gpu):
    logits, targets, weights = random_rows(40, torch.float32, 1500)
    first, second = (gpu(dk.diffusion_cross_entropy, logits, targets, weights) for _ in range(2))
    assert torch.equal(first, second)
    assert_close(first, dk.diffusion_cross_entropy(logits, targets, weights), torch.float32)


def projected(hidden, weight, bias, targets, weights):
    inputs = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    loss = dk.linear_diffusion_cross_entropy(*inputs[:2], targets, weights, inputs[2], suppress_tokens=[0])
    return loss.detach(), *torch.autograd.grad(0.3 * loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, vocabulary", [(12, 201), pytest.param(900, 1000, marks=hardware)])
def test_the_projected_loss_equals_the_cpu(gpu, rows, vocabulary, dtype):
    _, targets, weights = random_rows(vocabulary, dtype, 3, rows // 3)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, rows // 3, 64, generator=g).masked_fill((weights == 0)[..., None], torch.nan)
    weight, bias = torch.randn(vocabulary, 64, generator=g) / 8, torch.randn(vocabulary, generator=g)
    arguments = hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets, weights
    got, expected = gpu(projected, *arguments), projected(*arguments)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, dtype)


def test_bad_input_is_named(gpu):
    in_place = torch.ops.dllm_kernels.diffusion_cross_entropy_gradient_
    targets, weights = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    with pytest.raises(ValueError, match="suppress_tokens may list at most 64 ids on CUDA, got 65"):
        gpu(dk.diffusion_cross_entropy, torch.zeros(2, 99), targets, weights, suppress_tokens=range(65))
    with pytest.raises(ValueError, match="logits must be float32 or bfloat16 or float64, got float16"):
        gpu(in_place, torch.zeros(2, 9).half(), targets, weights, [])
    with pytest.raises(ValueError, match=r"weights must have one entry for each row of logits \[2, 9\]"):
        gpu(dk.diffusion_cross_entropy, torch.zeros(2, 9), targets, weights[:1])


# ---- on a GPU only ------------------------------------------------------------------------------------
@pytest.mark.graph
def test_the_loss_is_captured():
    """On replay logits and weights have changed in place."""
    logits, targets, weights = (t.cuda() for t in random_rows(3000, torch.bfloat16, 64))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        dk.diffusion_cross_entropy(logits, targets, weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = dk.diffusion_cross_entropy(logits, targets, weights)
    weights *= 2
    graph.replay()
    assert torch.equal(loss, dk.diffusion_cross_entropy(logits, targets, weights))
