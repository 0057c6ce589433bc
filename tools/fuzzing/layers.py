"""The small kernels of a layer and their gradients against autograd through the formulas in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fuzzing.draw import FLOATS, TOLERANCE, Draw, close


def _rows(draw: Draw, count: int) -> list[Tensor]:
    shape, dtype = (
        (draw.integer(0, 6), draw.integer(0, 6), draw.choice([1, 7, 32, 65, 515])),
        draw.choice(FLOATS),
    )
    return [draw.floats(*shape, dtype=dtype) for _ in range(count)]


def _gradients(function, inputs: list[Tensor], grads: list[Tensor]) -> tuple:
    leaves = [x.double().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, [grad.double() for grad in grads])


def _close(names: str, found: tuple, expected: tuple, tolerance: float) -> None:
    for name, one, other in zip(names.split(), found, expected, strict=True):
        size = 1 + other.abs().max() if other.numel() else 1
        close(name, one.double() / size, other / size, tolerance)


# ---- rms_norm ----------------------------------------------------------------------------------------------
def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_norm(draw: Draw) -> dict:
    (x,) = _rows(draw, 1)
    return {"x": x, "weight": draw.floats(x.shape[-1], dtype=x.dtype), "eps": draw.number(1e-6, 0.1)}


def check_rms_norm(draw: Draw, call: dict, result) -> None:
    expected = _normed(call["x"].double(), call["weight"].double(), call["eps"])
    _close("out", (result,), (expected,), TOLERANCE[call["x"].dtype])


def add_rms_norm(draw: Draw) -> dict:
    x, residual = _rows(draw, 2)
    return {
        "x": x, "residual": residual, "weight": draw.floats(x.shape[-1], dtype=x.dtype),
        "eps": draw.number(1e-6, 0.1),
    }  # fmt: skip


def check_add_rms_norm(draw: Draw, call: dict, result) -> None:
    total = call["x"] + call["residual"]
    expected = _normed(total.double(), call["weight"].double(), call["eps"])
    _close("out sum", result, (expected, total.double()), TOLERANCE[total.dtype])


def rms_norm_backward(draw: Draw) -> dict:
    grad, x, more = _rows(draw, 3)
    return {
        "grad": grad, "x": x, "weight": draw.floats(x.shape[-1], dtype=x.dtype),
        "eps": draw.number(1e-3, 0.1), "grad_sum": more if draw.chance(0.5) else None,
        "needs_grad_weight": draw.chance(0.7),
    }  # fmt: skip


def check_rms_norm_backward(draw: Draw, call: dict, result) -> None:
    eps, weight = call["eps"], call["weight"]
    of_x, of_weight = _gradients(lambda x, w: _normed(x, w, eps), [call["x"], weight], [call["grad"]])
    if call["grad_sum"] is not None:
        of_x = of_x + call["grad_sum"].double()
    if not call["needs_grad_weight"]:
        of_weight = of_weight[:0]
    _close("grad_x grad_weight", result, (of_x, of_weight), 2 * TOLERANCE[weight.dtype])


# ---- silu_mul ----------------------------------------------------------------------------------------------
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def silu_mul(draw: Draw) -> dict:
    gate, up = _rows(draw, 2)
    return {"gate": gate * draw.choice([1, 8]), "up": up}


def check_silu_mul(draw: Draw, call: dict, result) -> None:
    _close("out", (result,), (_gated(call["gate"].double(), call["up"].double()),), TOLERANCE[result.dtype])


def silu_mul_backward(draw: Draw) -> dict:
    grad, gate, up = _rows(draw, 3)
    return {"grad": grad, "gate": gate, "up": up}


def check_silu_mul_backward(draw: Draw, call: dict, result) -> None:
    expected = _gradients(_gated, [call["gate"], call["up"]], [call["grad"]])
    _close("grad_gate grad_up", result, expected, 2 * TOLERANCE[call["gate"].dtype])


# ---- rotate_half -------------------------------------------------------------------------------------------
def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    half = query.shape[-1] // 2
    turned = (torch.cat((-x[..., half:], x[..., :half]), -1) for x in (query, key))
    return tuple(
        x * cos[:, None] + other * sin[:, None] for x, other in zip((query, key), turned, strict=True)
    )


def rotate_half(draw: Draw, names: tuple[str, str] = ("query", "key")) -> dict:
    batch, length, dim = draw.integer(0, 3), draw.integer(0, 5), 2 * draw.choice([1, 3, 32, 65])
    dtype = draw.choice(FLOATS)
    heads = {name: draw.floats(batch, draw.integer(0, 4), length, dim, dtype=dtype) for name in names}
    angles = (draw.choice([1, batch]), length, dim)
    return heads | {name: draw.floats(*angles, dtype=dtype) for name in ("cos", "sin")}


def check_rotate_half(draw: Draw, call: dict, result) -> None:
    expected = _rotated(*(call[name].double() for name in ("query", "key", "cos", "sin")))
    _close("query key", result, expected, TOLERANCE[result[0].dtype])


def rotate_half_backward(draw: Draw) -> dict:
    return rotate_half(draw, ("grad_query", "grad_key"))


def check_rotate_half_backward(draw: Draw, call: dict, result) -> None:
    cos, sin, grads = call["cos"].double(), call["sin"].double(), [call["grad_query"], call["grad_key"]]
    expected = _gradients(lambda q, k: _rotated(q, k, cos, sin), [torch.ones_like(g) for g in grads], grads)
    _close("query key", result, expected, 2 * TOLERANCE[result[0].dtype])


CALLS = {
    "rms_norm": (rms_norm, check_rms_norm),
    "add_rms_norm": (add_rms_norm, check_add_rms_norm),
    "rms_norm_backward": (rms_norm_backward, check_rms_norm_backward),
    "silu_mul": (silu_mul, check_silu_mul),
    "silu_mul_backward": (silu_mul_backward, check_silu_mul_backward),
    "rotate_half": (rotate_half, check_rotate_half),
    "rotate_half_backward": (rotate_half_backward, check_rotate_half_backward),
}
