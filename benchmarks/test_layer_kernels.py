"""The small kernels of a layer beside the modules of transformers that they stand for, on the layers of a
308M model: a step of a sampler, and forward and backward of a training batch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import dllm_kernels as dk

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, EPS = 1024, 2816, 16, 64, 1e-6
STEP, BATCH = 32, 2048  # rows


def stock_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=EPS), total), total


def norm_inputs(rows: int, pick) -> list[Tensor]:
    width = pick(HIDDEN, 64)
    return [torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)]


def gate_inputs(rows: int, pick) -> list[Tensor]:
    """Parts of one product, as of merged projections."""
    return [*torch.randn(rows, 2 * pick(INTERMEDIATE, 96)).chunk(2, dim=-1)]


def head_inputs(rows: int, pick) -> list[Tensor]:
    query, key = torch.randn(2, 1, rows, pick(HEADS, 2), HEAD_DIM).transpose(2, 3)
    return [query, key, *torch.randn(2, 1, rows, HEAD_DIM)]


# name: (ours, of transformers, inputs, how many of them are differentiated)
KERNELS = {
    "rms_norm": (
        lambda x, residual, weight: dk.rms_norm(x, weight, EPS, residual),
        stock_norm,
        norm_inputs,
        3,
    ),
    "silu_mul": (dk.silu_mul, lambda gate, up: F.silu(gate) * up, gate_inputs, 2),
    "rotate_half": (dk.rotate_half, apply_rotary_pos_emb, head_inputs, 2),
}


@pytest.mark.parametrize("name", KERNELS)
def test_step(compare, pick, name):
    ours, stock, inputs, _ = KERNELS[name]
    rows = pick(STEP, 3)

    def given():
        return [tensor.detach() for tensor in inputs(rows, pick)]

    with torch.inference_mode():
        compare(
            ours,
            {"transformers": stock},
            inputs=given,
            title=f"{name}, {rows} rows",
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*given(), *given()[:2])),
            tolerance={"atol": 1e-5, "rtol": 1e-5},
        )


@pytest.mark.parametrize("name", KERNELS)
def test_forward_and_backward(compare, pick, name):
    """Memory is what the forward and backward pass add: results, what is kept between them, gradients."""
    ours, stock, inputs, leaves = KERNELS[name]
    rows = pick(BATCH, 3)

    def given():
        first, *rest = inputs(rows, pick)
        return [*(x.detach().requires_grad_() for x in (first, *rest)[:leaves]), *rest[leaves - 1 :]]

    def gradients(function):
        def run(*tensors):
            outputs = function(*tensors)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return torch.autograd.grad(outputs, tensors[:leaves], [torch.ones_like(out) for out in outputs])

        return run

    compare(
        gradients(ours),
        {"transformers": gradients(stock)},
        inputs=given,
        title=f"{name}, forward and backward, {rows} rows",
        tolerance={"atol": 2e-2, "rtol": 1e-4},
        memory=True,
    )
