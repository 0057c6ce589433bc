"""The small kernels of a layer of LLaDA-8B on a GPU, beside the same in PyTorch, as written and compiled."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import dllm_kernels as dk

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 4096, 12_288, 32, 128
TOLERANCE = {"atol": 5e-2, "rtol": 2e-2}
rows_of_a_step = pytest.mark.parametrize("rows", [64, 8192])


def beside(compare, device, ours, plain, rows, **options):
    """Compare with `plain`, and on a GPU with `plain` compiled."""
    baselines = {"PyTorch": plain}
    if device != "cpu":
        baselines["PyTorch, compiled"] = torch.compile(plain, dynamic=False)
    compare(ours, baselines, tolerance=TOLERANCE, batch=rows, **options)


def random(*shape, device):
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


@rows_of_a_step
def test_add_rms_norm(compare, pick, device, rows):
    rows, width = pick(rows, 3), pick(HIDDEN, 64)

    def plain(x, residual, weight):
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, 1e-5), total

    beside(
        compare,
        device,
        lambda x, residual, weight: dk.rms_norm(x, weight, 1e-5, residual),
        plain,
        rows,
        inputs=lambda: (
            *(random(rows, width, device=device) for _ in range(2)),
            random(width, device=device),
        ),
        title=f"rms_norm of a sum, {rows} rows",
        bytes=4 * 2 * rows * width,
    )


@rows_of_a_step
def test_silu_mul(compare, pick, device, rows):
    """Gate and up as parts of one product."""
    rows, width = pick(rows, 3), pick(INTERMEDIATE, 64)
    beside(
        compare,
        device,
        dk.silu_mul,
        lambda gate, up: F.silu(gate) * up,
        rows,
        inputs=lambda: random(rows, 2 * width, device=device).chunk(2, -1),
        title=f"silu_mul, {rows} rows",
        bytes=3 * 2 * rows * width,
    )


@rows_of_a_step
def test_rotate_half(compare, pick, device, rows):
    rows, heads, dim = pick(rows, 3), pick(HEADS, 2), pick(HEAD_DIM, 16)

    def inputs():
        merged = random(1, rows, 2 * heads, dim, device=device).transpose(1, 2)
        return *merged.chunk(2, 1), *(random(1, rows, dim, device=device) for _ in range(2))

    beside(
        compare,
        device,
        dk.rotate_half,
        apply_rotary_pos_emb,
        rows,
        inputs=inputs,
        title=f"rotate_half, {rows} positions",
        bytes=2 * 2 * 2 * rows * heads * dim,
    )
