"""Diffusion losses on CUDA against the CPU's."""

import pytest
import torch

import dllm_kernels as dk

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def batch(dtype):
    hidden, weight, bias = torch.randn(3, 300, 64), torch.randn(1000, 64) / 8, torch.randn(1000)
    weights = torch.rand(3, 300) * (torch.rand(3, 300) < 0.5)
    targets = torch.randint(1, 1000, (3, 300)).masked_fill(weights == 0, -100)
    hidden = hidden.masked_fill((weights == 0)[..., None], torch.nan)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets, weights


def assert_close(got, expected, dtype):
    bound = TOLERANCE[dtype] * float(expected.abs().max())
    torch.testing.assert_close(got.cpu().float(), expected.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_projected_loss_equals_the_cpu(dtype):
    hidden, weight, bias, targets, weights = batch(dtype)
    results = {}
    for device in ("cpu", "cuda"):
        inputs = [t.to(device).requires_grad_() for t in (hidden, weight, bias)]
        loss = dk.linear_diffusion_cross_entropy(
            *inputs[:2], targets.to(device), weights.to(device), inputs[2], suppress_tokens=[0]
        )
        results[device] = loss.detach(), *torch.autograd.grad(0.3 * loss, inputs)
    for got, expected in zip(results["cuda"], results["cpu"], strict=True):
        assert_close(got, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_loss_of_logits_equals_the_cpu(dtype):
    *_, targets, weights = batch(dtype)
    logits = torch.randn(3, 300, 1000).masked_fill((weights == 0)[..., None], torch.nan).to(dtype)
    results = {}
    for device in ("cpu", "cuda"):
        x = logits.to(device).requires_grad_()
        loss = dk.diffusion_cross_entropy(x, targets.to(device), weights.to(device), suppress_tokens=[0])
        results[device] = loss.detach(), *torch.autograd.grad(loss, x)
    for got, expected in zip(results["cuda"], results["cpu"], strict=True):
        assert_close(got, expected, dtype)
