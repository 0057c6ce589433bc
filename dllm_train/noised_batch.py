"""Check a batch and draw its noise: the input of a loss, independent of any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dllm_kernels._arguments import check_batch_vector, check_optional_tensors, check_tensors, integer, kind
from dllm_train.documents import Places, check_document_lengths, places
from dllm_train.noise import IGNORED_LABEL, Noise, Schedule, sample_noise


@dataclass(frozen=True)
class NoisedBatch:
    """x_0 and its noise; with `complementary` every row twice, the second time with its mask inverted.

    input_ids: int64 [B, L], BOS included. labels: int64 [B, L], -100 where a token is given. lengths: int64
    [B], or None where every row is full. document_lengths: int64 [B, D] or None. places: documents of the
    positions.
    masked: bool [B, L], the positions that are noised. t: float32 [B, L], their times.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: Tensor | None
    document_lengths: Tensor | None
    places: Places
    schedule: Schedule
    masked: Tensor
    t: Tensor


def noised_batch(
    input_ids: Tensor,
    labels: Tensor | None,
    lengths: Tensor | None,
    document_lengths: Tensor | None,
    *,
    noise: Noise | None,
    example_ids: Sequence[int] | Tensor | None,
    seed: int,
    epoch: int,
    eps: float,
    schedule: Schedule | str,
    stratified: bool,
    time_block: int | None,
    shift: bool,
    bos_id: int | None,
    complementary: bool,
) -> NoisedBatch:
    """Return the noised batch of a loss, on its device; arguments as in `mdlm_loss`.

    time_block: the positions of a document that share one t; None: all.
    """
    schedule = Schedule(schedule) if isinstance(schedule, str) else schedule
    labels = input_ids if labels is None else labels
    _check_ids(input_ids, labels)
    device, (rows, length) = input_ids.device, input_ids.shape
    labels = labels.to(device)
    lengths = _row_lengths(lengths, document_lengths, rows, length)
    if document_lengths is not None:
        document_lengths = document_lengths.to(device)
    if lengths is not None:
        lengths = lengths.to(device)
        labels = labels.masked_fill(torch.arange(length, device=device) >= lengths[:, None], IGNORED_LABEL)
    _check_labels(labels, input_ids)
    if shift and document_lengths is not None:
        labels = without_first_tokens(labels, document_lengths)
    elif shift:
        input_ids, labels, lengths = _prepend_bos(input_ids, labels, lengths, bos_id)
    if noise is None:
        noise = sample_noise(
            labels, range(rows) if example_ids is None else example_ids, seed=seed, epoch=epoch,
            schedule=schedule, eps=eps, block_size=time_block, stratified=stratified,
            document_lengths=document_lengths, complementary=complementary,
        )  # fmt: skip
    _check_noise(noise, input_ids, shift)
    t, masked = noise.t.to(device), noise.masked.to(device) & (labels != IGNORED_LABEL)
    if complementary:
        t = torch.cat([t, schedule.complement(t)])
        masked = torch.cat([masked, ~masked & (labels != IGNORED_LABEL)])
        input_ids, labels, lengths, document_lengths = (
            None if tensor is None else torch.cat([tensor, tensor])
            for tensor in (input_ids, labels, lengths, document_lengths)
        )
    where = places(input_ids.shape[1], document_lengths, device)
    return NoisedBatch(input_ids, labels, lengths, document_lengths, where, schedule, masked, t)


def without_first_tokens(labels: Tensor, document_lengths: Tensor) -> Tensor:
    """Return `labels` with -100 at the first token of every document, which no token of it precedes."""
    return labels.masked_fill(places(labels.shape[1], document_lengths).position == 0, IGNORED_LABEL)


def _row_lengths(lengths, document_lengths, rows: int, length: int) -> Tensor | None:
    """Return the checked number of tokens of each row; None if all rows are full."""
    check_optional_tensors(lengths=lengths)
    if lengths is not None:
        if lengths.shape != (rows,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected {(rows,)}")
        check_batch_vector("lengths", lengths, 0, length)
    if document_lengths is not None:
        check_document_lengths(document_lengths, rows, length)
        totals = document_lengths.sum(1)
        if lengths is not None and bool((totals != lengths.to(totals)).any()):
            raise ValueError(
                f"lengths is {lengths.tolist()}, and document_lengths sum to {totals.tolist()}; expected the "
                "same, or no lengths"
            )
        lengths = totals
    return None if lengths is None or bool((lengths == length).all()) else lengths


def _prepend_bos(input_ids, labels, lengths, bos_id):
    """Put BOS before every row whose first token has a label. If there is one, all rows get a column."""
    starts = labels[:, 0] != IGNORED_LABEL
    if not starts.any():
        return input_ids, labels, lengths
    if bos_id is None:
        raise ValueError("bos_id is None; with shift it is needed unless every label of column 0 is -100")
    bos_id, length = integer("bos_id", bos_id, 0), input_ids.shape[1]
    if not starts.all() or lengths is not None:
        lengths = (torch.full_like(labels[:, 0], length) if lengths is None else lengths) + starts

    def moved(tensor: Tensor, first: int, last: int) -> Tensor:
        return torch.where(starts[:, None], pad(tensor, (1, 0), value=first), pad(tensor, (0, 1), value=last))

    return moved(input_ids, bos_id, bos_id), moved(labels, IGNORED_LABEL, IGNORED_LABEL), lengths


def _check_ids(input_ids, labels) -> None:
    check_tensors(input_ids=input_ids, labels=labels)
    for name, tensor in (("input_ids", input_ids), ("labels", labels)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} is a {kind(tensor)}; expected int64 [B, L]")
    if input_ids.ndim != 2 or labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; "
            "expected both [B, L]"
        )
    if not input_ids.numel():
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected at least one token")


def _check_labels(labels: Tensor, input_ids: Tensor) -> None:
    wrong = (labels != IGNORED_LABEL) & (labels != input_ids)
    if labels is not input_ids and bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"labels[{row}, {column}] is {int(labels[row, column])}, where input_ids has "
            f"{int(input_ids[row, column])}; expected the same token, or {IGNORED_LABEL} where it is given"
        )


def _check_noise(noise, input_ids, shift: bool) -> None:
    if not isinstance(noise, Noise):
        raise TypeError(f"noise is a {type(noise).__name__}; expected a Noise, or None")
    if noise.masked.dtype != torch.bool:
        raise TypeError(f"noise.masked is a {kind(noise.masked)}; expected bool")
    if noise.masked.shape != input_ids.shape or noise.t.shape != input_ids.shape:
        raise ValueError(
            f"noise has shapes t {tuple(noise.t.shape)}, masked {tuple(noise.masked.shape)}; "
            f"expected {tuple(input_ids.shape)}" + (" (BOS included)" if shift else "")
        )
