"""token_stats against what the reference samplers run on the same logits."""

import pytest
import torch

import dllm_kernels as dk
from benchmarks import baselines
from benchmarks.workloads import random_logits

VOCABULARY = 126_464


def greedy(x):
    stats = dk.token_stats(x)
    return stats.token, stats.prob


def sampled(x):
    ids = torch.zeros(x.shape[0], 3, dtype=torch.int32, device=x.device)
    ids[:, 1] = torch.arange(x.shape[0], device=x.device)
    stats = dk.token_stats(x, temperature=1.0, seed=0, noise_ids=ids)
    return stats.token, stats.prob


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_token_stats_greedy(compare, pick, dtype):
    rows, vocabulary = pick(32, 4), pick(VOCABULARY, 1000)
    compare(
        greedy,
        {"softmax, argmax, gather": baselines.softmax_statistics},
        inputs=random_logits(rows, vocabulary, dtype=dtype),
        title=f"token_stats, {rows} rows of {vocabulary}, greedy, {dtype}".replace("torch.", ""),
        bytes=dtype.itemsize * rows * vocabulary,
        tolerance={"atol": 1e-5, "rtol": 1e-4},
    )


def test_token_stats_sampled(compare, pick):
    rows, vocabulary = pick(32, 4), pick(VOCABULARY, 1000)
    compare(
        sampled,
        {"float64 Gumbel": lambda x: baselines.gumbel_statistics(x, 1.0)},
        inputs=random_logits(rows, vocabulary),
        title=f"token_stats, {rows} rows of {vocabulary}, temperature 1",
        bytes=4 * rows * vocabulary,
    )


def test_token_stats_filtered(compare, pick):
    rows, vocabulary = pick(32, 4), pick(VOCABULARY, 1000)
    top_p, top_k = 0.95, 50
    compare(
        lambda x: dk.token_stats(x, top_p=top_p, top_k=top_k)[:2],
        {"sort, softmax, max": lambda x: baselines.filtered_statistics(x, top_p, top_k)},
        inputs=random_logits(rows, vocabulary),
        title=f"token_stats, {rows} rows of {vocabulary}, top-p and top-k",
        bytes=4 * rows * vocabulary,
        tolerance={"atol": 1e-5, "rtol": 1e-4},
    )
