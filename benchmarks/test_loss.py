"""Diffusion losses, forward and backward, against torch's cross entropy and Liger's fused loss."""

import torch

import dllm_kernels as dk
from benchmarks import baselines
from benchmarks.workloads import half_masked, head_flops, head_inputs

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


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
        title=f"linear_diffusion_cross_entropy, {rows} rows, {size} → {vocabulary}, forward and backward",
        flops=head_flops(rows, size, vocabulary),
        tolerance=TOLERANCE,
        memory=True,
    )


def test_loss(compare, pick):
    rows, vocabulary = pick((1024, 32_000), (16, 100))
    compare(
        of_logits,
        {"torch": baselines.cross_entropy_gradients},
        inputs=lambda: (torch.randn(rows, vocabulary).requires_grad_(), *half_masked(rows, vocabulary)),
        title=f"diffusion_cross_entropy, {rows} rows of {vocabulary}, forward and backward",
        bytes=4 * vocabulary * (rows // 2 * 2 + rows),  # masked rows are read twice, the gradient is whole
        tolerance=TOLERANCE,
        memory=True,
    )
