"""Diffusion losses on a GPU, forward and backward, against torch's cross entropy and Liger's fused loss."""

import torch

from benchmarks import baselines
from benchmarks.test_loss import of_logits, projected
from benchmarks.workloads import half_masked, head_flops, head_inputs


def test_linear_loss(compare, pick, device):
    rows, size, vocabulary = pick((8192, 4096, 126_464), (64, 64, 1000))
    others = {
        "torch": baselines.projected_cross_entropy,
        "torch, compacted": baselines.compacted_cross_entropy,
    }
    if baselines.installed("liger_kernel"):
        others["Liger"] = baselines.liger_cross_entropy
    compare(
        projected,
        others,
        inputs=head_inputs(rows, size, vocabulary, device=device, dtype=torch.bfloat16, uniform=True),
        title=f"linear_diffusion_cross_entropy, {rows} rows, {size} → {vocabulary}, forward and backward",
        flops=head_flops(rows, size, vocabulary),
        memory=True,
    )


def test_loss(compare, pick, device):
    rows, vocabulary = pick((4096, 126_464), (16, 100))

    def inputs():
        logits = torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16)
        return logits.requires_grad_(), *half_masked(rows, vocabulary, device)

    compare(
        of_logits,
        {"torch": baselines.cross_entropy_gradients},
        inputs=inputs,
        title=f"diffusion_cross_entropy, {rows} rows of {vocabulary}, forward and backward",
        bytes=2 * vocabulary * (rows // 2 * 2 + rows),
        memory=True,
    )
