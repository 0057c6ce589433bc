"""SampleOutput: what sampling returns, and how it is made from finished canvases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels.models.text import added_text
from dllm_kernels.sampling.prompts import Canvases, GappedText
from dllm_kernels.sampling.step import Logprobs


class TopLogprobs(NamedTuple):
    """The k likeliest tokens of each position, int64 [B, T, k], the likeliest first, -1 where nothing was
    written; their log-probabilities, float32 [B, T, k]."""

    tokens: Tensor
    logprobs: Tensor


@dataclass
class SampleOutput:
    """The result of `dk.sample` or `dk.infill`.

    sequences: int64 [B, T], prompt and completion, left-aligned, filled up with the end token.
    texts: one str per row, without special tokens; None without a tokenizer. Of `sample`, what the completion
    up to its first end token adds to the prompt: a space that parts the two is in it. Of `infill`, the text
    as it was given with its gaps filled (canvases of ids are decoded).
    lengths: int64 [B], completion tokens before the first end token (infill: filled).
    forwards: forward passes of the model, for the whole batch. row_forwards: int64 [B], each row's share.
    tokens_per_forward: the sum of lengths over that of row_forwards, 0 without forwards. So the end token
    does not count, the forward that computes the prompt does, and evaluations count alike.
    exact: whether every step saw what a forward over the whole canvas would have seen.
    unmask_step: int64 [B, T], the row's forward, from 0, that wrote a token; -1 for given and filled-up ones.
    history: int64 [B, T] at the start and after every round, if asked for.
    logprobs: float32 [B, T], the log-probability of each token in the step that wrote it, by the softmax over
    the logits, without the tokens that may not stand there; 0 for given and filled-up ones. None unless asked
    for.
    top_logprobs: the likeliest tokens of each position in that step.
    filled: infill only: for each row the spans [start, end) that were masked.
    """

    sequences: Tensor
    texts: list[str] | None
    lengths: Tensor
    forwards: int
    row_forwards: Tensor
    tokens_per_forward: float
    exact: bool
    unmask_step: Tensor
    history: list[Tensor] | None = None
    logprobs: Tensor | None = None
    top_logprobs: TopLogprobs | None = None
    filled: list[list[tuple[int, int]]] | None = None


@dataclass(frozen=True)
class Finished:
    """Rows at their ends.

    ids: int64 [B, T], the canvases. unmask_step: int64 [B, T], the row's step that wrote a token, -1: none.
    forwards: of the model, in all; row_forwards: int64 [B], those that each row took part in. exact: whether
    every step saw what a forward over the whole canvas would have. history: the canvases after every round,
    if they were asked for. logprobs: [B, T] and [B, T, k] in place of its N and k, or None.
    """

    ids: Tensor
    unmask_step: Tensor
    forwards: int
    row_forwards: Tensor
    exact: bool
    history: list[Tensor] | None
    logprobs: Logprobs | None = None

    def logprobs_where(self, written: Tensor) -> dict:
        """Return the fields of SampleOutput that hold them, for bool [B, T'] of tokens that steps wrote."""
        if self.logprobs is None:
            return {}
        chosen, tokens, top = (record[:, : written.shape[1]].cpu() for record in self.logprobs)
        chosen = chosen.masked_fill(~written, 0.0)
        if not top.shape[2]:
            return {"logprobs": chosen}
        tokens, top = tokens.masked_fill(~written[..., None], -1), top.masked_fill(~written[..., None], 0.0)
        return {"logprobs": chosen, "top_logprobs": TopLogprobs(tokens, top)}


def completion_output(
    canvases: Canvases, finished: Finished, eos_ids: tuple[int, ...], tokenizer
) -> SampleOutput:
    """Cut the canvases after `stop`; measure and decode the completions."""
    width = int(canvases.stop.max())
    ids, unmask_step = finished.ids[:, :width].cpu(), finished.unmask_step[:, :width].cpu()
    position = torch.arange(width, device="cpu")
    surplus = position >= canvases.stop[:, None]
    ids = ids.masked_fill(surplus, canvases.fill)
    history = finished.history
    if history is not None:
        history = [canvas[:, :width].cpu().masked_fill(surplus, canvases.fill) for canvas in history]
    unmask_step = unmask_step.masked_fill(surplus, -1)
    completion = (position >= canvases.given[:, None]) & ~surplus
    ended = completion & torch.isin(ids, torch.tensor(eos_ids, dtype=ids.dtype, device="cpu"))
    first_end = torch.where(ended.any(1), ended.int().argmax(1), canvases.stop)
    lengths = first_end - canvases.given
    texts = None
    if tokenizer is not None:
        texts = [
            added_text(tokenizer, row[:start], row[start:end])
            for row, start, end in zip(ids.tolist(), canvases.given.tolist(), first_end.tolist(), strict=True)
        ]
    return SampleOutput(
        sequences=ids,
        texts=texts,
        lengths=lengths,
        forwards=finished.forwards,
        row_forwards=finished.row_forwards,
        exact=finished.exact,
        unmask_step=unmask_step,
        tokens_per_forward=_tokens_per_forward(lengths, finished.row_forwards),
        history=history,
        **finished.logprobs_where(unmask_step >= 0),
    )


def infill_output(
    canvases: Canvases, masked: Tensor, finished: Finished, tokenizer, gapped: list[GappedText]
) -> SampleOutput:
    """Measure and decode filled canvases.

    masked: bool [B, T], what there was to fill. gapped: the rows as text; empty where ids were given.
    """
    ids, unmask_step, masked = finished.ids.cpu(), finished.unmask_step.cpu(), masked.cpu()
    texts = None
    if tokenizer is not None:
        rows = [row[:stop] for row, stop in zip(ids.tolist(), canvases.stop.tolist(), strict=True)]
        if gapped:
            texts = [text.completed(row) for text, row in zip(gapped, rows, strict=True)]
        else:
            texts = [added_text(tokenizer, [], row) for row in rows]
    return SampleOutput(
        sequences=ids,
        texts=texts,
        lengths=masked.sum(1),
        forwards=finished.forwards,
        row_forwards=finished.row_forwards,
        exact=finished.exact,
        unmask_step=unmask_step,
        history=finished.history,
        tokens_per_forward=_tokens_per_forward(masked.sum(1), finished.row_forwards),
        filled=[_spans(row) for row in masked],
        **finished.logprobs_where(unmask_step >= 0),
    )


def _tokens_per_forward(lengths: Tensor, row_forwards: Tensor) -> float:
    return int(lengths.sum()) / max(int(row_forwards.sum()), 1)


def _spans(masked: Tensor) -> list[tuple[int, int]]:
    edge = torch.nn.functional.pad(masked.int(), (1, 1)).diff()
    starts, ends = (edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist()
    return list(zip(starts, ends, strict=True))
