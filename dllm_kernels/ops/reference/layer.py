"""Small kernels of a transformer layer in plain PyTorch; they also stand in on devices without a kernel.

Rounding to the storage type is where transformers' modules round; arithmetic is float32 in between.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight · x / √(mean x² + eps): x [..., D], weight [D] -> [..., D]."""
    return (weight * _normed(x, eps).to(x.dtype)).contiguous()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return rms_norm(x + residual) and x + residual, [..., D] both."""
    total = (x + residual).contiguous()
    return rms_norm(total, weight, eps), total


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, grad_sum: Tensor | None, needs_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, to which grad_sum is added, and of weight (empty if it is not needed)."""
    wide, normed = _wide(x), _normed(x, eps)
    scale = _scale(wide, eps)
    inner = _wide(grad) * _wide(weight)
    grad_x = scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    if grad_sum is not None:
        grad_x = grad_x + _wide(grad_sum)
    grad_weight = weight.new_empty(0)
    if needs_grad_weight:
        products = _wide(grad) * _wide(normed.to(x.dtype))
        grad_weight = products.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype).contiguous(), grad_weight


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up, [..., I] all."""
    return (_silu(gate).to(gate.dtype) * up).contiguous()


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    wide, activation = _wide(gate), _silu(gate).to(gate.dtype)
    sigmoid = torch.sigmoid(wide)
    grad_gate = _wide(grad) * _wide(up) * sigmoid * (1 + wide * torch.sigmoid(-wide))
    grad_up = _wide(grad) * _wide(activation)
    return grad_gate.to(gate.dtype).contiguous(), grad_up.to(up.dtype).contiguous()


def rotate_half(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return x · cos + (−x₂, x₁) · sin of query [B, H, S, D] and key [B, Hkv, S, D], with the halves
    x = (x₁, x₂) of each head; cos and sin [B or 1, S, D]."""
    cos, sin = cos[:, None], sin[:, None]
    return tuple(_by_position(x * cos + turned(x) * sin) for x in (query, key))


def rotate_half_backward(
    grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and key."""
    cos, sin = _wide(cos)[:, None], _wide(sin)[:, None]
    grads = ((grad.dtype, _wide(grad)) for grad in (grad_query, grad_key))
    return tuple(_by_position((wide * cos - turned(wide * sin)).to(dtype)) for dtype, wide in grads)


def turned(x: Tensor) -> Tensor:
    """Return (−x₂, x₁) of the halves x = (x₁, x₂) of the last dimension."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scale(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _normed(x: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return wide * _scale(wide, eps)


def _silu(gate: Tensor) -> Tensor:
    return torch.nn.functional.silu(_wide(gate))


def _by_position(x: Tensor) -> Tensor:
    """Store heads [B, H, S, D] as [B, S, H, D], as the kernels do."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
