"""Diffusion losses in plain PyTorch; they also stand in on devices without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def diffusion_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, suppress_tokens: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ_i weights_i · CE_i, each CE_i and log Σ exp(logits_i); rows of weight 0 give 0, unread.

    logits [..., V], targets and weights [...] -> scalar and two [...], float32 (float64 for float64).
    """
    kept = weights != 0
    rows = _rows(logits, kept, suppress_tokens)
    logsumexp = rows.logsumexp(-1)
    ce = logsumexp - rows.gather(-1, targets[kept][:, None])[:, 0]
    loss = (weights[kept].to(ce.dtype) * ce).sum()
    return loss, *(rows.new_zeros(weights.shape).masked_scatter(kept, value) for value in (ce, logsumexp))


def diffusion_cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    logsumexp: Tensor,
    suppress_tokens: Sequence[int] = (),
) -> Tensor:
    """Return the gradient of the logits: grad_loss · weights_i · (softmax(logits_i) − onehot(targets_i))."""
    kept = weights != 0
    gradient = torch.exp(_rows(logits, kept, suppress_tokens) - logsumexp[kept][:, None])
    gradient[torch.arange(len(gradient), device=logits.device), targets[kept]] -= 1
    gradient *= (grad_loss * weights[kept].to(gradient.dtype))[:, None]
    result = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    result[kept] = gradient.to(logits.dtype)
    return result


def diffusion_cross_entropy_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor, suppress_tokens: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Return loss and each CE_i, and replace the logits by their gradient."""
    loss, ce, logsumexp = diffusion_cross_entropy(logits, targets, weights, suppress_tokens)
    one = torch.ones_like(loss)
    logits.copy_(diffusion_cross_entropy_backward(one, logits, targets, weights, logsumexp, suppress_tokens))
    return loss, ce


def linear_diffusion_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    suppress_tokens: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Return loss and each CE_i of logits = hidden · weightᵀ + bias."""
    logits = F.linear(hidden, weight, bias)
    return diffusion_cross_entropy(logits, targets, weights, suppress_tokens)[:2]


def _rows(logits: Tensor, kept: Tensor, suppress_tokens: Sequence[int]) -> Tensor:
    rows = logits[kept].to(torch.promote_types(logits.dtype, torch.float32))
    barred = torch.tensor(list(suppress_tokens), dtype=torch.int64, device=logits.device)
    return rows.index_fill(-1, barred, -torch.inf)
