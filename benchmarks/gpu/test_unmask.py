"""Statistics and commit on a GPU against what the reference samplers run on the same logits."""

import pytest
import torch

import dllm_kernels as dk
from benchmarks import baselines
from benchmarks.workloads import random_logits

VOCABULARY, BLOCK = 126_464, 32
MASK_ID = 5


def greedy(x):
    return dk.token_stats(x)[:2]


@pytest.mark.parametrize("rows", [32, 1024])
def test_token_stats_greedy(compare, pick, device, rows):
    rows, vocabulary = pick(rows, 4), pick(VOCABULARY, 1000)
    compare(
        greedy,
        {"softmax, argmax, gather": baselines.softmax_statistics},
        inputs=random_logits(rows, vocabulary, dtype=torch.bfloat16, device=device),
        title=f"token_stats, {rows} rows of {vocabulary}, greedy",
        bytes=2 * rows * vocabulary,
        tolerance=None,  # equal bfloat16 logits: torch takes any of the largest
    )


@pytest.mark.parametrize("rows", [32, 1024])
def test_token_stats_sampled(compare, pick, device, rows):
    rows, vocabulary = pick(rows, 4), pick(VOCABULARY, 1000)
    compare(
        lambda x: dk.token_stats(x, temperature=1.0)[:2],
        {"float64 Gumbel": lambda x: baselines.gumbel_statistics(x, 1.0)},
        inputs=random_logits(rows, vocabulary, dtype=torch.bfloat16, device=device),
        title=f"token_stats, {rows} rows of {vocabulary}, temperature 1",
        bytes=2 * rows * vocabulary,
    )


@pytest.mark.parametrize("batch", [1, 32])
def test_unmask(compare, pick, device, batch):
    """A whole step of `batch` blocks after the model: statistics, acceptance, tokens written."""
    vocabulary = pick(VOCABULARY, 1000)

    def inputs():
        canvas = torch.full((batch, BLOCK), MASK_ID, device=device)
        return canvas, *random_logits(batch * BLOCK, vocabulary, dtype=torch.bfloat16, device=device)()

    def ours(canvas, x):
        logits = x.view(batch, BLOCK, vocabulary)
        return dk.unmask_(
            canvas, logits, dk.Rule.threshold(0.9), mask_id=MASK_ID, block_start=0, block_size=BLOCK
        )

    compare(
        ours,
        {"softmax, threshold, scatter": lambda canvas, x: baselines.threshold_step(canvas, x, 0.9, MASK_ID)},
        inputs=inputs,
        title=f"unmask_, {batch} blocks of {BLOCK}, vocabulary {vocabulary}",
        bytes=2 * batch * BLOCK * vocabulary,
    )


@pytest.mark.parametrize("rows", [32, 64, 256])
def test_linear_token_stats(compare, pick, device, rows):
    rows, size, vocabulary = pick(rows, 4), pick(4096, 64), pick(VOCABULARY, 1000)
    compare(
        lambda hidden, weight: dk.linear_token_stats(hidden, weight)[:2],
        {"linear, softmax, argmax, gather": baselines.projected_statistics},
        inputs=lambda: (
            torch.randn(rows, size, device=device, dtype=torch.bfloat16),
            torch.randn(vocabulary, size, device=device, dtype=torch.bfloat16) / size**0.5,
        ),
        title=f"linear_token_stats, {rows} rows, {size} → {vocabulary}",
        flops=2 * rows * size * vocabulary,
        bytes=2 * size * vocabulary,
        memory=True,
    )
