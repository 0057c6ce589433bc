"""Weights of masked positions in a loss, and the divisor of the sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dllm_kernels._arguments import kind, number
from dllm_train.documents import Places
from dllm_train.noise import IGNORED_LABEL
from dllm_train.noised_batch import NoisedBatch, without_first_tokens

NORM_TYPES = ("token", "sequence", "batch")


def loss_normalizer(
    labels: Tensor,
    loss_norm_type: str = "token",
    *,
    lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    shift: bool = False,
) -> int:
    """Return the count of a batch that `normalizer` takes; counts of a global batch's parts add up.

    labels: int64 [B, L], -100 where a token is given. "token": maskable positions, those with a label; with
    `shift`, the first token of a packed document is none. "sequence", "batch": documents of packed rows, else
    rows. "next_token": what `ar_normalizer` counts, the labels that a token of their document precedes.
    """
    check_choice("loss_norm_type", loss_norm_type, (*NORM_TYPES, "next_token"))
    if loss_norm_type in ("sequence", "batch"):
        return len(labels) if document_lengths is None else int((document_lengths > 0).sum())
    if document_lengths is not None:
        lengths = document_lengths.sum(1)
    if lengths is not None:
        column = torch.arange(labels.shape[1], device=labels.device)
        labels = labels.masked_fill(column >= lengths.to(labels.device)[:, None], IGNORED_LABEL)
    if document_lengths is not None and (shift or loss_norm_type == "next_token"):
        labels = without_first_tokens(labels, document_lengths.to(labels.device))
    elif loss_norm_type == "next_token" and not shift:  # with shift BOS precedes a first token with a label
        labels = labels[:, 1:]
    return int((labels != IGNORED_LABEL).sum())


def row_weights(
    batch: NoisedBatch,
    row: Tensor,
    column: Tensor,
    *,
    loss_weight_type: str,
    weight_eps: float,
    cart_p: float,
) -> tuple[Tensor, Tensor]:
    """Return the weights of masked positions (row, column), not normalised, and their w(t): float32 [N]."""
    scheduler = batch.schedule.weight(batch.t[row, column], eps=weight_eps)
    if loss_weight_type == "scheduler":
        return scheduler, scheduler
    if loss_weight_type == "uniform":
        return torch.ones_like(scheduler), scheduler
    visible = ~batch.masked & batch.places.inside
    if batch.lengths is not None:
        visible &= torch.arange(visible.shape[1], device=visible.device) < batch.lengths[:, None]
    weights = cart_weights(visible, batch.places, cart_p)[row, column].to(scheduler)
    return weights.clamp(min=_NEARLY_ZERO), scheduler


_NEARLY_ZERO = 1e-30  # the operators skip rows of weight 0, whose cross entropy the meters need


def cart_weights(visible: Tensor, where: Places, p: float) -> Tensor:
    """Return Dream's context weights (Ye et al. 2025), float64 [B, L]: Σ_j ½ p (1 - p)^(|i - j| - 1).

    j runs over the other positions of i's document that are visible, bool [B, L]. Each side is the recursion
    s_i = (1 - p) s_(i-1) + visible_i, computed in log2(L) steps over whole rows.
    """

    def before(visible: Tensor, starts: Tensor) -> Tensor:
        """Return Σ_(j < i) (1 - p)^(i - j - 1) visible_j within documents that begin at `starts`."""
        total = visible.double()
        decay = torch.where(starts, 0.0, torch.full_like(total, 1 - p))
        step = 1
        while step < total.shape[1]:
            total[:, step:] += decay[:, step:] * total[:, :-step]
            decay[:, step:] = decay[:, step:] * decay[:, :-step]
            step *= 2
        shifted = torch.zeros_like(total)
        shifted[:, 1:] = total[:, :-1]
        return shifted.masked_fill(starts, 0)

    document = where.document
    edge = torch.ones_like(document[:, :1], dtype=torch.bool)
    changes = document[:, 1:] != document[:, :-1]
    left = before(visible, torch.cat([edge, changes], dim=1))
    right = before(visible.flip(1), torch.cat([changes, edge], dim=1).flip(1)).flip(1)
    return p / 2 * (left + right)


def norm_shares(
    batch: NoisedBatch, row: Tensor, column: Tensor, loss_norm_type: str
) -> tuple[Tensor | None, int, int]:
    """Return the divisor of each masked position (row, column) before normalisation, int64 [N] or None for 1,
    the number of maskable positions, and the count of `normalizer`."""
    maskable, documents = batch.labels != IGNORED_LABEL, batch.document_lengths
    tokens = int(maskable.sum())
    if loss_norm_type == "token":
        return None, tokens, tokens
    count = len(maskable) if documents is None else int((documents > 0).sum())
    if loss_norm_type == "batch":
        return None, tokens, count
    document = batch.places.document.expand_as(maskable)
    of_document = torch.zeros(
        len(maskable), int(document.max()) + 1, dtype=torch.int64, device=document.device
    )
    of_document.scatter_add_(1, document, maskable.long())
    return of_document[row, document[row, column]], tokens, count


def next_tokens(batch: NoisedBatch, rows: int) -> tuple[Tensor, Tensor]:
    """Return row and column, int64 [M] each, of the labels in the first `rows` rows that a token of their
    document precedes."""
    preceded = (batch.labels != IGNORED_LABEL) & (batch.places.position > 0)
    return preceded[:rows].nonzero(as_tuple=True)


def divisor(name: str, value, default: int):
    """Return the divisor of a sum: `value`, `default` if it is None, and 1 in place of 0.

    value: a number, or a Tensor of one on any device, which the host does not wait for.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} is a {kind(value)}; expected a number, or a Tensor of one")
        value = value.detach().reshape(())
        return torch.where(value == 0, torch.ones_like(value), value)
    if value is not None and not 0 <= number(name, value) < math.inf:
        raise ValueError(f"{name} is {value}; expected a number that is not negative, or None")
    return (default if value is None else value) or 1


def check_choice(name: str, value, allowed) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
