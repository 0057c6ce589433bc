"""The document of each position of a row, and its distance from the document's start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dllm_kernels._arguments import kind


@dataclass(frozen=True)
class Places:
    """document: int64 [B or 1, L], the number of each position's document within its row. position: int64
    [B or 1, L], counted from the document's start. inside: bool [B or 1, L], False for padding, whose
    position is 0 and whose document is that of no other position."""

    document: Tensor
    position: Tensor
    inside: Tensor


def places(length: int, document_lengths: Tensor | None = None, device=None) -> Places:
    """Return the places of rows of `length` tokens.

    document_lengths: int64 [B, D], zero-filled, the documents of packed rows from left to right; None: a row
    is one document. The result is on its device, or on `device` (default: the CPU).
    """
    if document_lengths is None:
        position = torch.arange(length, device=device or "cpu")[None]
        return Places(torch.zeros_like(position), position, torch.ones_like(position, dtype=torch.bool))
    ends = document_lengths.cumsum(1)
    row = torch.arange(length, device=ends.device).expand(len(ends), -1).contiguous()
    document = torch.searchsorted(ends, row, right=True)
    inside = row < ends[:, -1:]
    position = torch.where(inside, row - pad(ends, (1, 0)).gather(1, document), 0)
    return Places(document, position, inside)


def check_document_lengths(document_lengths: Tensor, rows: int, length: int) -> None:
    """Raise TypeError or ValueError unless `document_lengths` fit `rows` rows of `length` tokens."""
    if not isinstance(document_lengths, Tensor) or document_lengths.dtype != torch.int64:
        raise TypeError(f"document_lengths is a {kind(document_lengths)}; expected int64 [B, D], or None")
    if document_lengths.dim() != 2 or len(document_lengths) != rows or not document_lengths.shape[1]:
        raise ValueError(f"document_lengths has shape {list(document_lengths.shape)}; expected [{rows}, D]")
    if bool((document_lengths < 0).any()):
        raise ValueError(f"document_lengths holds {int(document_lengths.min())}; expected no negative length")
    longest = int(document_lengths.sum(1).max()) if rows else 0
    if longest > length:
        raise ValueError(
            f"document_lengths of a row sum to {longest}; rows of input_ids have {length} tokens"
        )
