"""Diffusion losses, forward and backward, against torch's cross entropy and Liger's fused loss."""

import importlib.util

import pytest
import torch

import dllm_kernels as dk
from benchmarks import baselines

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def half_masked(rows, vocabulary, device="cpu"):
    """Targets, and weights of which every second is 0."""
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    weights = (torch.rand(rows, device=device) + 0.5) / rows
    weights[::2] = 0
    return targets, weights


def head_inputs(rows, size, vocabulary, device="cpu", dtype=torch.float32, uniform=False):
    def make():
        hidden = torch.randn(rows, size, device=device, dtype=dtype)
        weight = torch.randn(vocabulary, size, device=device, dtype=dtype) * size**-0.5
        targets, weights = half_masked(rows, vocabulary, device)
        return (
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            weights.sign() if uniform else weights,
        )

    return make


def flops(rows, size, vocabulary):
    """Of the three products, over the rows of weight other than 0."""
    return 3 * 2 * (rows // 2) * size * vocabulary


def projected(hidden, weight, targets, weights):
    loss = dk.linear_diffusion_cross_entropy(hidden, weight, targets, weights)
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def of_logits(logits, targets, weights):
    loss = dk.diffusion_cross_entropy(logits, targets, weights)
    return loss, *torch.autograd.grad(loss, logits)


def test_linear_loss(compare, pick):
    rows, size, vocabulary = pick((2048, 512, 32_000), (32, 16, 100))
    compare(
        projected,
        {"torch": baselines.projected_cross_entropy, "torch, compacted": baselines.compacted_cross_entropy},
        inputs=head_inputs(rows, size, vocabulary),
        flops=flops(rows, size, vocabulary),
        tolerance=TOLERANCE,
        memory=True,
    )


def test_loss(compare, pick):
    rows, vocabulary = pick((1024, 32_000), (16, 100))
    compare(
        of_logits,
        {"torch": baselines.cross_entropy_gradients},
        inputs=lambda: (torch.randn(rows, vocabulary).requires_grad_(), *half_masked(rows, vocabulary)),
        bytes=4 * vocabulary * (rows // 2 * 2 + rows),  # masked rows are read twice, the gradient is whole
        tolerance=TOLERANCE,
        memory=True,
    )


@pytest.mark.gpu
def test_linear_loss_gpu(compare, pick):
    rows, size, vocabulary = pick((8192, 4096, 126_464), (64, 64, 1000))
    others = {
        "torch": baselines.projected_cross_entropy,
        "torch, compacted": baselines.compacted_cross_entropy,
    }
    if importlib.util.find_spec("liger_kernel"):
        others["Liger"] = baselines.liger_cross_entropy
    compare(
        projected,
        others,
        inputs=head_inputs(rows, size, vocabulary, "cuda", torch.bfloat16, uniform=True),
        flops=flops(rows, size, vocabulary),
        memory=True,
    )
