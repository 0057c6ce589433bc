"""Losses and their gradients against torch's cross entropy in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dllm_kernels.ops import reference
from fuzzing.draw import FLOATS, TOLERANCE, Draw, close


def diffusion_cross_entropy(draw: Draw) -> dict:
    rows, vocabulary = draw.integer(0, 12), draw.choice([1, 2, 7, 33, 300, 1030])
    suppressed = draw.some(range(vocabulary), most=min(3, vocabulary - 1))
    allowed = [token for token in range(vocabulary) if token not in suppressed]
    targets = torch.tensor([draw.choice(allowed) for _ in range(rows)], dtype=torch.int64)
    weights = torch.rand(rows) * (torch.rand(rows) < 0.7)
    dtype = draw.choice([*FLOATS, torch.float64])
    return {
        "logits": draw.floats(rows, vocabulary, dtype=dtype, scale=draw.choice([1.0, 8.0])),
        "targets": targets.masked_fill(weights == 0, draw.integer(-100, vocabulary)),
        "weights": weights.to(draw.choice([torch.float32, torch.float64, torch.bfloat16])),
        "suppress_tokens": suppressed,
    }


def _expected(call: dict):
    """Loss, ce and the gradient of the logits, by autograd through torch's cross entropy in float64."""
    logits = call["logits"].double().clone().requires_grad_()
    precision = torch.promote_types(call["logits"].dtype, torch.float32)
    weights = call["weights"].to(precision).double()
    kept = weights != 0
    barred = torch.zeros(logits.shape[1], dtype=torch.bool)
    barred[call["suppress_tokens"]] = True
    rows = logits[kept].masked_fill(barred, -torch.inf)
    ce = torch.zeros_like(weights)
    ce[kept] = F.cross_entropy(rows, call["targets"][kept], reduction="none")
    loss = (weights * ce).sum()
    (gradient,) = torch.autograd.grad(loss, logits) if kept.any() else (torch.zeros_like(logits),)
    return loss.detach(), ce.detach(), gradient


def check_diffusion_cross_entropy(draw: Draw, call: dict, result) -> None:
    loss, ce, _ = _expected(call)
    tolerance = 1e-9 if call["logits"].dtype == torch.float64 else 2e-4
    close("loss", result[0], loss, tolerance)
    close("ce", result[1], ce, tolerance)


def diffusion_cross_entropy_backward(draw: Draw) -> dict:
    call = diffusion_cross_entropy(draw)
    _, _, logsumexp = torch.ops.dllm_kernels.diffusion_cross_entropy(**call)
    return {"grad_loss": torch.tensor(draw.number(-2, 2)), **call, "logsumexp": logsumexp}


def check_diffusion_cross_entropy_backward(draw: Draw, call: dict, result) -> None:
    tolerance = TOLERANCE[call["logits"].dtype]
    close("grad_logits", result, call["grad_loss"].double() * _expected(call)[2], max(tolerance, 1e-7))


def diffusion_cross_entropy_gradient_(draw: Draw) -> dict:
    call = diffusion_cross_entropy(draw)
    dtype = draw.choice([torch.float32, torch.float64])
    return {**call, "logits": torch.empty(call["logits"].shape, dtype=dtype).copy_(call["logits"])}


def check_diffusion_cross_entropy_gradient_(draw: Draw, call: dict, result, before: dict) -> None:
    loss, ce, gradient = _expected(before)
    tolerance = 1e-9 if call["logits"].dtype == torch.float64 else 2e-4
    close("loss", result[0], loss, tolerance)
    close("ce", result[1], ce, tolerance)
    close("logits", call["logits"], gradient, tolerance)


def linear_diffusion_cross_entropy(draw: Draw) -> dict:
    call = diffusion_cross_entropy(draw)
    (rows, vocabulary), size = call.pop("logits").shape, draw.integer(1, 20)
    dtype = draw.choice([torch.float32, torch.float64])
    bias = draw.floats(vocabulary, dtype=dtype) if draw.chance(0.5) else None
    needs_grad = [draw.chance(0.7), draw.chance(0.7), bias is not None and draw.chance(0.7)]
    return {
        "hidden": draw.floats(rows, size, dtype=dtype), "weight": draw.floats(vocabulary, size, dtype=dtype),
        **call, "bias": bias, "needs_grad": needs_grad,
    }  # fmt: skip


def check_linear_diffusion_cross_entropy(draw: Draw, call: dict, result) -> None:
    names = ("hidden", "weight", "bias")
    leaves = [None if call[n] is None else call[n].double().clone().requires_grad_() for n in names]
    loss, ce = reference.linear_diffusion_cross_entropy(
        *leaves[:2], call["targets"], call["weights"].double(), leaves[2], call["suppress_tokens"]
    )
    tolerance = 1e-8 if call["hidden"].dtype == torch.float64 else 5e-4
    if call["weights"].dtype == torch.float64 and call["hidden"].dtype == torch.float32:
        tolerance = max(tolerance, 1e-6)
    close("loss", result[0], loss.detach(), tolerance)
    close("ce", result[1], ce.detach(), tolerance)
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
    for name, needed, found, expected in zip(names, call["needs_grad"], result[2:], gradients, strict=False):
        if needed:
            close(f"grad_{name}", found, expected, tolerance)


CALLS = {
    "diffusion_cross_entropy": (diffusion_cross_entropy, check_diffusion_cross_entropy),
    "diffusion_cross_entropy_backward": (
        diffusion_cross_entropy_backward,
        check_diffusion_cross_entropy_backward,
    ),
    "diffusion_cross_entropy_gradient_": (
        diffusion_cross_entropy_gradient_,
        check_diffusion_cross_entropy_gradient_,
    ),
    "linear_diffusion_cross_entropy": (
        linear_diffusion_cross_entropy,
        check_linear_diffusion_cross_entropy,
    ),
}
