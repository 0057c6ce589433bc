"""Turn what the caller gives into canvases: texts, ids and tensors; canvases and texts with gaps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dllm_kernels._arguments import integer, kind
from dllm_kernels.models.text import added_text, check_text, check_token_count, encode
from dllm_kernels.sampling.canvas_control import AllowedTokens

_ALLOWED = "give a str, a list of str, a list of id lists, or a Tensor [B, S]"


@dataclass
class Canvases:
    """B canvases of unequal length in one tensor.

    ids: int64 [B, T], filled up with `fill`; all others int64 [B], on the CPU.
    given: length of the prompt (infill: 0), where the completion starts. origin: where blocks count from.
    stop: end of what is returned. end: end of the canvas, which may be later. numbers: what noise knows the
    rows by. draft: bool [B, T], given tokens that the rule may change; None: none. allowed: the tokens that
    may stand at some positions; None: everywhere all.
    """

    ids: Tensor
    given: Tensor
    origin: Tensor
    stop: Tensor
    end: Tensor
    numbers: Tensor
    fill: int
    draft: Tensor | None = None
    allowed: AllowedTokens | None = None


def completions(rows: list[list[int]], plan, new_tokens=None, row_ids=None) -> Canvases:
    """Prompts followed by the new tokens as masks; block-causal canvases end at a block border.

    new_tokens: of each row, in place of max_new_tokens. row_ids: in place of 0, 1, ….
    """
    size = plan.config.block_size
    given = torch.tensor([len(row) for row in rows], device="cpu")
    if new_tokens is None:
        stop = given + plan.config.max_new_tokens
    else:
        stop = given + torch.tensor(_of_rows("new_tokens", new_tokens, len(rows), 1), device="cpu")
    origin, end = given.clone(), stop.clone()
    if plan.block_causal:
        origin, end = plan.parity.block_borders(given, stop, size)
    plan.check_positions(given, end)
    ids = torch.full((len(rows), int(end.max())), plan.fill, device="cpu")
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, device="cpu")
        ids[index, len(row) : end[index]] = plan.mask_id
    end = plan.parity.padded(end)
    return Canvases(ids, given, origin, stop, end, _numbers(row_ids, len(rows)), plan.fill)


def gaps(canvases: list[list[int]], fill: int, row_ids=None, draft=None, allowed=None) -> Canvases:
    """Canvases that hold their masks already; row_ids: in place of 0, 1, …."""
    stop = torch.tensor([len(canvas) for canvas in canvases], device="cpu")
    ids = torch.full((len(canvases), int(stop.max())), fill, device="cpu")
    for row, canvas in enumerate(canvases):
        ids[row, : len(canvas)] = torch.tensor(canvas, device="cpu")
    zero = torch.zeros_like(stop)
    return Canvases(ids, zero, zero, stop, stop, _numbers(row_ids, len(canvases)), fill, draft, allowed)


def token_lists(
    what: str, given, attention_mask: Tensor | None, ids_of_text: Callable[[str, str], list[int]] | None
) -> list[list[int]]:
    """Return `given` as one list of ids per row; `what` ("prompts" or "canvases") names it in errors.

    ids_of_text: ids of a text, called with its name and the text; None without a tokenizer.
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
        if ids_of_text is None:
            raise ValueError(f"{what} is text, which needs tokenizer=; or give token ids")
        return [ids_of_text(f"{what}[{index}]", text) for index, text in enumerate(given)]
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


def _numbers(row_ids, count: int) -> Tensor:
    """Return int64 [B], what noise knows the rows by."""
    return torch.tensor(
        range(count) if row_ids is None else _of_rows("row_ids", row_ids, count, 0), device="cpu"
    )


def _of_rows(name: str, values, count: int, least: int) -> list[int]:
    """Return one integer per row, of `least` or more and below 2**31."""
    if not isinstance(values, Sequence | Tensor) or isinstance(values, str | bytes):
        raise TypeError(f"{name} is a {kind(values)}; give one integer per row")
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} rows; give one integer per row")
    return [integer(f"{name}[{row}]", value, least, 2**31 - 1) for row, value in enumerate(values)]


def _items(name: str, row: Sequence | Tensor) -> Sequence:
    if not isinstance(row, Tensor):
        return row
    if row.dim() != 1:
        raise TypeError(f"{name} must be a list of ids or a Tensor [S], got {kind(row)}")
    return row.tolist()


# ---- texts with gaps --------------------------------------------------------------------------------------
# Text with gaps: its token ids with masks in the gaps, and the text again once they are filled.

_LONGEST_GAP = 2**20
_FEW = 8  # tokens that show how a run of them begins or ends
_ANCHORS = ("\n", "(", ".", ",", "=", "1", "a", "e")


@dataclass(frozen=True)
class Part:
    """A run of token ids. text: what the user wrote there; None: to be read off the filled canvas."""

    ids: list[int]
    text: str | None


@dataclass(frozen=True)
class GappedText:
    """A text with gaps. prefix, suffix: the special tokens that the tokenizer puts around a whole text."""

    tokenizer: object
    prefix: list[int]
    parts: list[Part]
    suffix: list[int]

    @property
    def ids(self) -> list[int]:
        """The canvas: the given tokens, and the mask token in every gap."""
        return [*self.prefix, *(token for part in self.parts for token in part.ids), *self.suffix]

    def completed(self, ids: list[int]) -> str:
        """Return the text with its gaps filled as in `ids`, the canvas `self.ids` without masks.

        Parts whose ids are the given ones stay as the user wrote them, whatever the tokenizer makes of them.
        """
        parts, start = [], 0
        for part in (Part(self.prefix, ""), *self.parts, Part(self.suffix, "")):
            found = ids[start : start + len(part.ids)]
            parts.append(part if found == part.ids else Part(found, None))
            start += len(found)
        text, start = "", 0
        for part, following in pairwise([*parts, Part([], "")]):
            end = start + len(part.ids)
            if part.text is None:
                text += self._filling(text, ids[:start], ids[start:end], following)
            else:
                text += part.text
            start = end
        return text

    def _filling(self, text: str, before: list[int], ids: list[int], following: Part) -> str:
        """Return the text of a gap between `text`, whose ids are `before`, and the part that follows.

        At both borders the ids say whether there is a space, except where the tokenizer reads the text alike
        with and without it, and where it left a given space out of the ids.
        """
        filling = added_text(self.tokenizer, before, ids)
        if filling.startswith(" ") and text:
            read = added_text(self.tokenizer, [], before[-_FEW:])
            left_out = text[-1].isspace() and not read[-1:].isspace()
            if left_out or self._reads_alike(text, filling[1:]):
                filling = filling[1:]
        if filling and following.text and not (filling[-1].isspace() or following.text[0].isspace()):
            parted = added_text(self.tokenizer, before + ids, following.ids[:_FEW]).startswith(" ")
            if parted and not self._reads_alike(filling, following.text):
                filling += " "
        return filling

    def _reads_alike(self, left: str, right: str) -> bool:
        """Return whether a space between two texts changes nothing in the ids of the words at the border."""
        left, right = re.search(r"\S*\s*$", left[-64:])[0], re.match(r"\s*\S*", right[:64])[0]
        spaced, joined = (_inner(self.tokenizer, left + space + right) for space in (" ", ""))
        return spaced == joined


def gapped_text(name: str, text: str, tokenizer, mask_id: int, limit: int | None = None) -> GappedText:
    """Return `text` as ids, where `<mask:24>` and the tokenizer's own mask token are gaps.

    The ids are those of the whole text with mask tokens in its gaps: special tokens stand at its ends alone,
    and a piece behind a gap has no space before it that is not there. limit: the model's positions, if it has
    a limit; longer texts raise ValueError.
    """
    check_text(name, text)
    check_token_count(name, text, tokenizer, limit)
    mask = _mask_in_text(tokenizer, mask_id)
    pieces = _pieces(text, mask)
    masks = sum(piece for piece in pieces if isinstance(piece, int))
    if limit is not None and masks > limit:
        raise ValueError(f"{name} has gaps of {masks} tokens; the model has {limit} positions")
    if len(pieces) == 1 and isinstance(pieces[0], str):
        ids = encode(name, text := pieces[0], tokenizer)
        return GappedText(tokenizer, [], [Part(ids, None if mask_id in ids else text)], [])
    strips = mask is not None and _inner(tokenizer, f"a {mask}") == [*_inner(tokenizer, "a"), mask_id]
    parts: list[Part] = []
    for index, piece in enumerate(pieces):
        if isinstance(piece, int):
            parts.append(Part([mask_id] * piece, None))
            continue
        # Masks that take the space before them stand for a word and its space.
        read = piece[:-1] if strips and piece.endswith(" ") and index + 1 < len(pieces) else piece
        ids = _continuation(tokenizer, read, mask) if index else encode(name, read, tokenizer, False)
        parts.append(Part(ids, None if mask_id in ids else piece))
    prefix, suffix = special_tokens_around(tokenizer, [piece for piece in pieces if isinstance(piece, str)])
    return GappedText(tokenizer, prefix, parts, suffix)


def _pieces(text: str, mask: str | None) -> list[str | int]:
    """Cut a text into what is given, str, and gaps, int: their mask tokens. Gaps of none join their sides."""
    pieces: list[str | int] = []

    def add(piece: str | int) -> None:
        if pieces and piece and type(piece) is type(pieces[-1]):
            pieces[-1] += piece
        elif piece:
            pieces.append(piece)

    for index, piece in enumerate(re.split("<mask:([0-9]+)>", text)):
        if index % 2:
            add(integer("N of <mask:N>", int(piece.lstrip("0")[:12] or "0"), 0, _LONGEST_GAP))
        else:
            add(piece)
    if mask is None:
        return pieces or [""]
    given, pieces = pieces, []
    for piece in given:
        if isinstance(piece, int):
            add(piece)
            continue
        first, *others = piece.split(mask)
        add(first)
        for other in others:
            add(1)
            add(other)
    return pieces or [""]


def _mask_in_text(tokenizer, mask_id: int) -> str | None:
    """Return how a text says the mask token; None where it cannot, or where it is an ordinary word."""
    if getattr(tokenizer, "mask_token_id", None) == mask_id:
        token = getattr(tokenizer, "mask_token", None)
    else:
        token = getattr(tokenizer, "added_tokens_decoder", {}).get(mask_id)
    return str(token) if token is not None and _inner(tokenizer, str(token)) == [mask_id] else None


def special_tokens_around(tokenizer, pieces: list[str]) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a text."""
    special = {*getattr(tokenizer, "all_special_ids", ())}
    for piece in (*pieces, "a"):
        inner, whole = _inner(tokenizer, piece[:32]), encode("a canvas", piece[:32], tokenizer)
        if not inner or (special & {*inner} and whole != inner and piece != "a"):
            continue
        for start in range(len(whole) - len(inner), -1, -1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
    return encode("a canvas", "", tokenizer), []


def prompt_text_ids(name: str, text: str, tokenizer, limit: int | None = None) -> list[int]:
    """Return the ids of a text that masks follow, with the special tokens that come before a text and none
    behind it. limit: the positions that they must fit."""
    check_text(name, text)
    check_token_count(name, text, tokenizer, limit)
    ids = encode(name, text, tokenizer, special_tokens=False)
    before, _ = special_tokens_around(tokenizer, [text])
    return [*before, *ids]


def _continuation(tokenizer, piece: str, mask: str | None) -> list[int]:
    """Return the ids of a piece that stands behind a gap.

    Tokenizers that put a space before every text (SentencePiece's dummy prefix) put it before a piece, too.
    There the piece is read behind a character whose ids stay as they are, which are then left out.
    """
    alone = _inner(tokenizer, piece)
    for anchor in _ANCHORS if mask is None else (mask, *_ANCHORS):
        head = _inner(tokenizer, anchor)
        spaces = _spaces_at(tokenizer, head, alone)
        if spaces is None:
            continue
        given = len(piece) - len(piece.lstrip())
        if spaces <= given:
            return alone
        joined = _inner(tokenizer, anchor + piece)
        if joined[: len(head)] != head:
            continue
        behind = joined[len(head) :]
        if behind == alone and anchor != mask:
            return alone  # the tokenizer does not tell a word from one behind a space
        if (_spaces_at(tokenizer, head, behind) or 0) <= given:
            return behind
    return alone


def _spaces_at(tokenizer, head: list[int], ids: list[int]) -> int | None:
    """Return the number of spaces that decoding puts between `head` and `ids`; None if `head` has no text."""
    start, whole = tokenizer.decode(head), tokenizer.decode([*head, *ids[:_FEW]])
    if not start or not whole.startswith(start):
        return None
    return len(whole) - len(start) - len(whole[len(start) :].lstrip())


def _inner(tokenizer, text: str) -> list[int]:
    return encode("a canvas", text, tokenizer, special_tokens=False)
