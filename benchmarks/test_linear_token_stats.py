"""linear_token_stats against the library's projection followed by softmax, argmax and gather."""

import pytest
import torch

import dllm_kernels as dk
from benchmarks import baselines

VOCABULARY, HIDDEN = 126_464, 1024


@pytest.mark.parametrize("rows", [4, 32, 64])
def test_linear_token_stats(compare, pick, rows):
    hidden_size, vocabulary = pick(HIDDEN, 64), pick(VOCABULARY, 1000)
    compare(
        lambda hidden, weight: dk.linear_token_stats(hidden, weight)[:2],
        {"linear, softmax, argmax, gather": baselines.projected_statistics},
        inputs=lambda: (
            torch.randn(rows, hidden_size),
            torch.randn(vocabulary, hidden_size) / hidden_size**0.5,
        ),
        title=f"linear_token_stats, {rows} rows, {hidden_size} → {vocabulary}, float32",
        flops=2 * rows * hidden_size * vocabulary,
        bytes=4 * hidden_size * vocabulary,
        tolerance={"atol": 1e-4, "rtol": 1e-4},
        memory=True,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_linear_token_stats_narrow_weight(compare, pick, dtype):
    """Beside the same projection stored as float32: the library's 16-bit products are far slower here."""
    hidden_size, vocabulary, rows = pick(HIDDEN, 64), pick(VOCABULARY, 1000), pick(32, 4)
    weight = (torch.randn(vocabulary, hidden_size) / hidden_size**0.5).to(dtype)
    wide = weight.float()
    compare(
        lambda hidden: dk.linear_token_stats(hidden, weight)[:2],
        {"float32 linear, softmax, argmax, gather": lambda x: baselines.projected_statistics(x, wide)},
        inputs=lambda: (torch.randn(rows, hidden_size),),
        title=f"linear_token_stats, {rows} rows, {hidden_size} → {vocabulary}, {dtype} weight".replace(
            "torch.", ""
        ),
        flops=2 * rows * hidden_size * vocabulary,
        bytes=2 * hidden_size * vocabulary,
        tolerance={"atol": 1e-4, "rtol": 1e-4},
    )
