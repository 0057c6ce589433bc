"""Derivatives are right, or an error says that they do not exist: none is silently 0 or None."""

import warnings

import pytest
import torch

import dllm_kernels as dk
from tests.ops.test_bad_input import OPS, calls

TARGETS, WEIGHTS = torch.tensor([1, 0, 4]), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)


def attention(x):
    return dk.block_attention(x, x, x).pow(2).sum()


def loss(x):
    return dk.diffusion_cross_entropy(x, TARGETS, WEIGHTS, suppress_tokens=[2])


def loss_of_weights(x):
    logits = torch.linspace(-1, 1, 15).reshape(3, 5)
    return dk.diffusion_cross_entropy(logits, TARGETS, x)


def linear_loss(x):
    return dk.linear_diffusion_cross_entropy(x, HEAD, TARGETS, WEIGHTS.to(x.dtype))


def linear_loss_of_head(x):
    return dk.linear_diffusion_cross_entropy(torch.ones(3, 4, dtype=x.dtype), x, TARGETS, x[:3, 0].square())


def norm(x):
    return dk.rms_norm(x, x[0], 1e-5).pow(2).sum()


def norm_of_sum(x):
    out, total = dk.rms_norm(x, x[0], 1e-5, residual=x.square())
    return out.pow(2).sum() + total.pow(2).sum()


def gated(x):
    return dk.silu_mul(x, 2 * x).pow(2).sum()


def rotation(x):
    angles = x[:, 0]
    return sum(out.pow(3).sum() for out in dk.rotate_half(x, x, angles.cos(), angles.sin()))


HEAD = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# What is differentiated, and where.
FUNCTIONS = {
    attention: torch.randn(1, 2, 3, 8),
    loss: torch.randn(3, 5, dtype=torch.float64),
    loss_of_weights: torch.rand(3),
    linear_loss: torch.randn(3, 4, dtype=torch.float64),
    linear_loss_of_head: torch.randn(5, 4, dtype=torch.float64),
    norm: torch.randn(3, 8),
    norm_of_sum: torch.randn(3, 8),
    gated: torch.randn(3, 8),
    rotation: torch.randn(1, 2, 3, 8),
}
BY_NAME = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
REFUSED = pytest.raises(NotImplementedError, match="no derivative is implemented; take a gradient of")
FORWARD = pytest.raises(NotImplementedError, match="has a tangent, but derivatives in forward mode")


@BY_NAME
def test_the_gradient_is_right(function):
    x = FUNCTIONS[function].clone().requires_grad_()
    small, (gradient,) = 1e-3, torch.autograd.grad(function(x), x)
    direction = torch.randn_like(x)
    with torch.no_grad():
        slope = (function(x + small * direction) - function(x - small * direction)) / (2 * small)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("function", [loss, linear_loss], ids=lambda function: function.__name__)
def test_gradcheck(function):
    assert torch.autograd.gradcheck(function, FUNCTIONS[function].clone().requires_grad_())


@BY_NAME
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_gradient_may_be_part_of_a_graph(function, scale):
    """create_graph=True alone changes nothing; the second gradient raises."""
    x = FUNCTIONS[function].clone().requires_grad_()
    (plain,) = torch.autograd.grad(scale * function(x), x)
    (recorded,) = torch.autograd.grad(scale * function(x), x, create_graph=True)
    torch.testing.assert_close(recorded.detach(), plain)
    with REFUSED:
        torch.autograd.grad(recorded.pow(2).sum() + x.sum(), x, retain_graph=True)
    with REFUSED:
        recorded.sum().backward()


@BY_NAME
def test_function_transforms(function):
    """grad is right; what goes through a second derivative or a tangent raises."""
    x = FUNCTIONS[function]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(function)(x), expected)
    value, pullback = torch.func.vjp(function, x)
    torch.testing.assert_close(pullback(2 * torch.ones_like(value))[0], 2 * expected)
    with FORWARD:
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with FORWARD:
        torch.func.hessian(function)(x)
    with pytest.raises(NotImplementedError):
        torch.func.grad(lambda y: torch.func.grad(function)(y).pow(2).sum())(x)
    with FORWARD, torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@BY_NAME
def test_gradients_of_a_batch_of_inputs(function):
    x = torch.stack([FUNCTIONS[function], FUNCTIONS[function] + 1])
    expected = torch.stack([torch.func.grad(function)(row) for row in x])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a loop over the rows
            found = torch.func.vmap(torch.func.grad(function))(x)
    except RuntimeError:
        return  # refused by torch, as an operator without a rule for batches may be
    torch.testing.assert_close(found, expected)


WITHOUT = {
    name: calls()[name]
    for name in (
        "token_stats", "token_divergence", "linear_token_stats", "skinny_linear", "cached_block_attention",
    )
}  # fmt: skip


@pytest.mark.parametrize("operator", WITHOUT)
def test_a_backward_pass_through_what_has_no_derivative_raises(operator):
    call = WITHOUT[operator]
    first = next(iter(call))
    leaf = call[first].clone().requires_grad_()
    outputs = getattr(OPS, operator)(**{**call, first: leaf})
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    for output in outputs:
        if output.is_floating_point():
            with pytest.raises(NotImplementedError, match=f"{operator}: no derivative is implemented"):
                (output.sum() + leaf.sum()).backward(retain_graph=True)
    with torch.no_grad():
        without = getattr(OPS, operator)(**{**call, first: leaf})
    assert not any(output.requires_grad for output in without) if isinstance(without, tuple) else True
    with FORWARD:
        torch.func.jvp(lambda x: getattr(OPS, operator)(**{**call, first: x}), (call[first],), (call[first],))


def test_statistics_of_logits_that_require_grad_commit():
    logits = torch.randn(1, 4, 12).requires_grad_()
    canvas, positions = torch.full((1, 4), 9), torch.arange(4, dtype=torch.int32)[None]
    stats = dk.token_stats(logits, suppress_tokens=[9])
    accepted = dk.commit_(canvas, positions, stats, dk.Rule.threshold(0.0), mask_id=9)
    assert accepted.all() and torch.equal(canvas, stats.token)


@pytest.mark.parametrize("name", ["cache_k", "cache_v", "k", "v"])
def test_keys_that_require_grad_are_written_without_autograd_only(name):
    call = calls()["kv_write_"]
    call[name] = call[name].clone().requires_grad_()
    before = call["cache_k"].detach().clone()
    with pytest.raises(ValueError, match=f"kv_write_: {name} requires grad, .* torch.no_grad"):
        dk.kv_write_(**call)
    assert torch.equal(call["cache_k"], before)
    with torch.no_grad():
        dk.kv_write_(**call)
    assert not torch.equal(call["cache_k"], before)


def test_logits_that_require_grad_do_not_become_their_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match="diffusion_cross_entropy_gradient_: logits requires grad"):
        OPS.diffusion_cross_entropy_gradient_(logits, TARGETS, WEIGHTS, [])


def test_a_backward_pass_that_needs_what_was_written_raises():
    x = torch.randn(3, 5, requires_grad=True)
    saved = x.exp()  # its own value is saved for the backward pass
    OPS.diffusion_cross_entropy_gradient_(saved.detach(), TARGETS, WEIGHTS, [])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("name", ["cache_k", "cache_v"])
def test_a_negative_view_is_refused_before_anything_is_written(name):
    call = calls()["kv_write_"]
    call = {n: v.zero_() if n.startswith("cache") else v for n, v in call.items()}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            changed = {**call, name: torch._neg_view(torch.zeros_like(call[name]))}
            with pytest.raises(ValueError, match=f"kv_write_: {name} is written and must not be a negative"):
                dk.kv_write_(**changed)
            assert not any(changed[n].any() for n in ("cache_k", "cache_v"))


def test_negative_views_are_read():
    call, expected = calls()["kv_write_"], calls()["kv_write_"]
    expected["k"] = -call["k"]
    expected["v"] = call["v"]
    dk.kv_write_(**{**call, "k": torch._neg_view(call["k"])})
    dk.kv_write_(**expected)
    assert torch.equal(call["cache_k"][0, :4], expected["cache_k"][0, :4])
