"""From what a user gives (text, ids, tensors) to canvases: token ids with masks where text is to come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels._arguments import integer, kind

_GAP = re.compile(r"<mask:([0-9]+)>")
_LONGEST_GAP = 2**20


_ALLOWED = "give a str, a list of str, a list of id lists, or a Tensor [B, S]"


@dataclass
class Canvases:
    """B canvases of unequal length in one tensor.

    ids: int64 [B, T], filled up with `fill`; all others int64 [B], on the CPU.
    given: length of the prompt (infill: 0), where the completion starts. origin: where blocks count from.
    stop: end of what is returned. end: end of the canvas, which may be later.
    """

    ids: Tensor
    given: Tensor
    origin: Tensor
    stop: Tensor
    end: Tensor
    fill: int


def completions(rows: list[list[int]], job) -> Canvases:
    """Prompts followed by the new tokens as masks; block-causal canvases end at a block border."""
    size, new_tokens = job.config.block_size, job.config.max_new_tokens
    given = torch.tensor([len(row) for row in rows], device="cpu")
    stop = given + new_tokens
    origin, end = given.clone(), stop.clone()
    if job.block_causal:
        if job.parity.blocks_from_prompt:
            origin = given % size
        else:
            origin, end = torch.zeros_like(given), -(-stop // size) * size
    job.check_positions(given, end)
    ids = torch.full((len(rows), int(end.max())), job.fill, device="cpu")
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, device="cpu")
        ids[index, len(row) : end[index]] = job.mask_id
    if job.parity.padding_seen:
        end = end.amax().expand_as(end)
    return Canvases(ids, given, origin, stop, end, job.fill)


def gaps(canvases: list[list[int]], fill: int) -> Canvases:
    """Canvases that hold their masks already."""
    stop = torch.tensor([len(canvas) for canvas in canvases], device="cpu")
    ids = torch.full((len(canvases), int(stop.max())), fill, device="cpu")
    for row, canvas in enumerate(canvases):
        ids[row, : len(canvas)] = torch.tensor(canvas, device="cpu")
    zero = torch.zeros_like(stop)
    return Canvases(ids, zero, zero, stop, stop, fill)


def token_lists(
    what: str, given, attention_mask: Tensor | None, tokenizer, mask_id: int | None
) -> list[list[int]]:
    """`given` as one list of ids per row; `what` ("prompts" or "canvases") names it in errors.

    In text, `<mask:24>` stands for 24 mask tokens where `what` is "canvases".
    """
    if attention_mask is not None and not isinstance(given, Tensor):
        raise TypeError(f"attention_mask goes with a Tensor of {what}, not with a {type(given).__name__}")
    if isinstance(given, Tensor):
        return _rows_of_tensor(what, given, attention_mask)
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise TypeError(f"{what} is a {kind(given)}; {_ALLOWED}")
    if not given:
        raise ValueError(f"{what} is empty; {_ALLOWED}")
    if all(isinstance(row, str) for row in given):
        if tokenizer is None:
            raise ValueError(f"{what} is text, which needs tokenizer=; or give token ids")
        return [_ids_of_text(what, text, tokenizer, mask_id) for text in given]
    if all(isinstance(row, Sequence | Tensor) and not isinstance(row, str | bytes) for row in given):
        return [
            [integer(f"an id in {what}[{index}]", token) for token in _items(f"{what}[{index}]", row)]
            for index, row in enumerate(given)
        ]
    found = ", ".join(sorted({type(row).__name__ for row in given}))
    raise TypeError(f"{what} is a {type(given).__name__} of {found}; {_ALLOWED}")


def check_ids(what: str, rows: list[list[int]], vocab_size: int | None, may_be_empty: bool = False) -> None:
    """Every row has tokens, unless it `may_be_empty`, and every token is in the vocabulary."""
    for index, row in enumerate(rows):
        if not row and may_be_empty:
            continue
        if not row:
            raise ValueError(
                f"{what}[{index}] is empty; it needs a token to start from. For text from nothing use "
                "dk.infill with a canvas of mask tokens"
            )
        low, high = min(row), max(row)
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            limit = f"0..{vocab_size - 1}" if vocab_size is not None else ">= 0"
            raise ValueError(
                f"{what}[{index}] holds id {low if low < 0 else high}; the vocabulary is {limit}"
            )


def _rows_of_tensor(what: str, given: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if given.dtype not in (torch.int32, torch.int64) or given.is_nested or given.dim() != 2:
        found = "a nested Tensor" if given.is_nested else kind(given)
        raise TypeError(f"{what} must be an int64 or int32 Tensor [B, S], got {found}")
    if given.is_meta or given.layout != torch.strided:
        raise TypeError(f"{what} must be a dense Tensor with data, got one on {given.device}, {given.layout}")
    if not given.shape[0]:
        raise ValueError(f"{what} holds no rows")
    if attention_mask is None:
        return given.tolist()
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a Tensor [B, S], got {kind(attention_mask)}")
    if attention_mask.shape != given.shape:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}, {what} is {list(given.shape)}")
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask must hold 1 for tokens and 0 for padding, and holds other values")
    rows = []
    for index, (row, real) in enumerate(zip(given, attention_mask.to(given.device).bool(), strict=True)):
        place = real.nonzero()[:, 0]
        if len(place) and int(place[-1] - place[0]) >= len(place):
            raise ValueError(
                f"attention_mask[{index}] has zeros between ones: padding stands before and after the tokens"
            )
        rows.append(row[place].tolist())
    return rows


def _items(name: str, row: Sequence | Tensor) -> Sequence:
    if not isinstance(row, Tensor):
        return row
    if row.dim() != 1:
        raise TypeError(f"{name} must be a list of ids or a Tensor [S], got {kind(row)}")
    return row.tolist()


def _ids_of_text(what: str, text: str, tokenizer, mask_id: int | None) -> list[int]:
    if what != "canvases":
        return tokenizer(text)["input_ids"]
    pieces = _GAP.split(text)
    ids = list(tokenizer(pieces[0])["input_ids"])
    for length, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        gap = integer("N of <mask:N>", int(length), 0, _LONGEST_GAP)
        ids += [mask_id] * gap + list(tokenizer(piece, add_special_tokens=False)["input_ids"])
    return ids
