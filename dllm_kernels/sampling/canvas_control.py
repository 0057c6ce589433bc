"""What a caller says about positions of a canvas: which given tokens are a draft, and which tokens may stand
where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dllm_kernels._arguments import integer, kind
from dllm_kernels.models.text import encode

Pinned: TypeAlias = bool | Tensor | Sequence[Sequence[bool]]
TokenSet: TypeAlias = Sequence[int] | Sequence[str]
Allowed: TypeAlias = TokenSet | Mapping[int, TokenSet] | Sequence[Mapping[int, TokenSet] | None]

_PINNED = "give True, False, a bool Tensor [B, T], or a list of bools for each canvas"
_ALLOWED = (
    "give token ids for every mask, a mapping from positions to token ids, or one such mapping (or None) "
    "for each canvas"
)


@dataclass(frozen=True)
class AllowedTokens:
    """The tokens that may stand at some positions.

    number: int64 [B, T], the set of a position; -1: every token may stand there. sets: sorted ids of each.
    """

    number: Tensor
    sets: list[tuple[int, ...]]

    def bar(self, logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Return logits [N, V] of positions [N] in rows [N], -inf for tokens that may not stand there."""
        number = self.number[row, position]
        place = (number >= 0).nonzero()[:, 0]
        if not len(place):
            return logits
        mask = self._mask(logits.shape[1]).to(logits.device)[number[place]]
        return logits.index_copy(0, place, logits[place].masked_fill(~mask, -torch.inf))

    def _mask(self, vocab_size: int) -> Tensor:
        """Return bool [S, V]."""
        mask = torch.zeros(len(self.sets), vocab_size, dtype=torch.bool, device="cpu")
        for number, tokens in enumerate(self.sets):
            if tokens[-1] >= vocab_size:
                raise ValueError(f"allowed holds {tokens[-1]}; the vocabulary is 0..{vocab_size - 1}")
            mask[number, list(tokens)] = True
        return mask


def draft_of(pinned: Pinned, rows: list[list[int]], mask_id: int, rule: str) -> Tensor | None:
    """Return bool [B, T], the given tokens that the rule may change; None where there are none.

    rows: the canvases' ids. Raise TypeError or ValueError for `pinned` of another shape, and where the rule
    cannot change tokens.
    """
    if pinned is True:
        return None
    draft = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool, device="cpu")
    for index, (row, fixed) in enumerate(zip(rows, _pinned_rows(pinned, rows), strict=True)):
        given = torch.tensor(row, device="cpu") != mask_id
        draft[index, : len(row)] = given & ~fixed
    if not draft.any():
        return None
    if rule != "edit":
        raise ValueError(
            f"pinned leaves given tokens free to change, which the rule {rule!r} never does; give "
            "edit_threshold and threshold, or put mask tokens where text is to come"
        )
    return draft


def _pinned_rows(pinned: Pinned, rows: list[list[int]]) -> list[Tensor]:
    """Return a bool [T] for each canvas."""
    if pinned is False:
        return [torch.zeros(len(row), dtype=torch.bool, device="cpu") for row in rows]
    if isinstance(pinned, Tensor):
        if pinned.dtype != torch.bool or pinned.dim() != 2:
            raise TypeError(f"pinned is a {kind(pinned)}; {_PINNED}")
        if len(pinned) != len(rows) or pinned.shape[1] < max(map(len, rows)):
            raise ValueError(
                f"pinned is {list(pinned.shape)} for canvases {[len(rows), max(map(len, rows))]}"
            )
        return [fixed[: len(row)] for fixed, row in zip(pinned.cpu(), rows, strict=True)]
    if not isinstance(pinned, Sequence) or isinstance(pinned, str | bytes):
        raise TypeError(f"pinned is a {kind(pinned)}; {_PINNED}")
    if len(pinned) != len(rows):
        raise ValueError(f"pinned has {len(pinned)} entries for {len(rows)} canvases; {_PINNED}")
    fixed = []
    for index, (one, row) in enumerate(zip(pinned, rows, strict=True)):
        one = one.tolist() if isinstance(one, Tensor) else one
        if not isinstance(one, Sequence) or not all(isinstance(flag, bool) for flag in one):
            raise TypeError(f"pinned[{index}] is a {kind(one)}; {_PINNED}")
        if len(one) != len(row):
            raise ValueError(f"pinned[{index}] has {len(one)} entries; the canvas has {len(row)} tokens")
        fixed.append(torch.tensor(one, dtype=torch.bool, device="cpu"))
    return fixed


def allowed_tokens(
    allowed: Allowed, rows: list[list[int]], *, mask_id: int, barred: Sequence[int], vocab_size: int | None,
    tokenizer=None,
) -> AllowedTokens:  # fmt: skip
    """Return `allowed` for the masked positions of canvases `rows`.

    barred: tokens that are never proposed. vocab_size: None: not known. Raise TypeError or ValueError for
    positions that are not masked, ids outside the vocabulary, texts of more than one token, and sets of which
    nothing is left.
    """
    number = torch.full((len(rows), max(map(len, rows))), -1, device="cpu")
    numbers: dict[tuple[int, ...], int] = {}
    for index, (row, sets) in enumerate(zip(rows, _sets_of_rows(allowed, rows, mask_id), strict=True)):
        for position, tokens in sets.items():
            name = f"allowed[{index}]" if len(rows) > 1 else "allowed"
            position = integer(f"a position in {name}", position, 0, len(row) - 1)
            if row[position] != mask_id:
                raise ValueError(f"{name} names position {position}, which holds no mask token")
            tokens = _token_set(f"{name}[{position}]", tokens, vocab_size, tokenizer)
            if not set(tokens) - {mask_id, *barred}:
                raise ValueError(
                    f"{name}[{position}] is {list(tokens)}, of which suppress_tokens and the mask token "
                    "leave none"
                )
            number[index, position] = numbers.setdefault(tokens, len(numbers))
    return AllowedTokens(number, list(numbers))


def _sets_of_rows(allowed: Allowed, rows: list[list[int]], mask_id: int) -> list[Mapping[int, TokenSet]]:
    """Return a mapping from positions to tokens for each canvas."""
    if isinstance(allowed, Mapping):
        allowed = [allowed]
    if isinstance(allowed, Tensor):
        allowed = allowed.tolist()
    if not isinstance(allowed, Sequence) or isinstance(allowed, str | bytes):
        raise TypeError(f"allowed is a {kind(allowed)}; {_ALLOWED}")
    if not any(one is None or isinstance(one, Mapping) for one in allowed):
        return [{p: allowed for p, token in enumerate(row) if token == mask_id} for row in rows]
    if len(allowed) != len(rows):
        raise ValueError(f"allowed has {len(allowed)} entries for {len(rows)} canvases; {_ALLOWED}")
    for index, one in enumerate(allowed):
        if one is not None and not isinstance(one, Mapping):
            raise TypeError(f"allowed[{index}] is a {kind(one)}; {_ALLOWED}")
    return [{} if one is None else one for one in allowed]


def _token_set(name: str, tokens: TokenSet, vocab_size: int | None, tokenizer) -> tuple[int, ...]:
    """Return sorted token ids."""
    if isinstance(tokens, Tensor):
        tokens = tokens.tolist()
    if not isinstance(tokens, Sequence | set | frozenset | range) or isinstance(tokens, str | bytes):
        raise TypeError(
            f"{name} is a {kind(tokens)}; give a list of token ids, or of texts of one token each"
        )
    highest = 2**31 - 1 if vocab_size is None else vocab_size - 1
    ids = {_token(name, token, highest, tokenizer) for token in tokens}
    if not ids:
        raise ValueError(f"{name} is empty: some token must be allowed to stand there")
    return tuple(sorted(ids))


def _token(name: str, token: int | str, highest: int, tokenizer) -> int:
    if not isinstance(token, str):
        return integer(f"an id in {name}", token, 0, highest)
    if tokenizer is None:
        raise ValueError(f"{name} holds the text {token!r}, which needs tokenizer=; or give token ids")
    ids = encode(name, token, tokenizer, special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{name} holds {token!r}, which is {len(ids)} tokens; a position holds one")
    return ids[0]
