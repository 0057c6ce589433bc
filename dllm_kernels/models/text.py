"""Token ids of a text and the text of token ids, by any tokenizer that is used like those of transformers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from dllm_kernels._arguments import integer, kind

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTEXT = 32  # tokens before a piece of text that determine its spelling
_CHUNK = 2**16  # characters; tokenizers of the tokenizers library take 330 bytes for each
_SLACK = 8  # tokens that cutting a text in two may add


def check_tokenizer(tokenizer) -> None:
    """Raise TypeError unless `tokenizer` can be called with a text and decodes ids."""
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        found = f"{type(tokenizer).__module__.partition('.')[0]}.{type(tokenizer).__name__}"
        if type(tokenizer).__module__ == "builtins":
            found = type(tokenizer).__name__
        raise TypeError(
            f"tokenizer is a {found}; give a tokenizer of transformers (for one of the tokenizers library "
            "transformers.PreTrainedTokenizerFast(tokenizer_object=...))"
        )


def check_text(name: str, text: str) -> None:
    """Raise ValueError if `text` holds half of a surrogate pair, which no tokenizer can read."""
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise ValueError(
            f"{name} holds the lone surrogate U+{ord(found[0]):04X} at character {found.start()}: half of a "
            "character, or a byte that was not UTF-8; replace it, or decode the text again"
        )


def check_token_count(name: str, text: str, tokenizer, limit: int | None) -> None:
    """Raise ValueError for a text of more than `limit` tokens, having read little more than that many.

    A text of one chunk passes: its exact length is known soon enough.
    """
    if limit is None or len(text) <= _CHUNK:
        return
    start = tokens = 0
    while start < len(text):
        end = min(start + _CHUNK, len(text))
        if end < len(text):
            border = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = border if border > start else end
        tokens += len(encode(name, text[start:end], tokenizer, special_tokens=False)) - _SLACK
        if tokens > limit:
            raise ValueError(
                f"{name} is too long: its first {end} of {len(text)} characters are more "
                f"than {tokens} tokens; the model has {limit} positions"
            )
        start = end


def text_ids(name: str, text: str, tokenizer, limit: int | None = None) -> list[int]:
    """Return the ids of a text that a user gave as `name`; limit: the positions that they must fit."""
    check_text(name, text)
    check_token_count(name, text, tokenizer, limit)
    return encode(name, text, tokenizer)


def encode(name: str, text: str, tokenizer, special_tokens: bool = True) -> list[int]:
    """Return the ids of `text`, with the tokenizer's special tokens around them or without.

    ValueError as of `check_text`.
    """
    check_text(name, text)
    options = {} if special_tokens or not _takes_special_tokens(tokenizer) else {"add_special_tokens": False}
    encoding = tokenizer(text, **options)
    ids = encoding["input_ids"] if isinstance(encoding, Mapping) else getattr(encoding, "input_ids", encoding)
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, Sequence) and len(ids) == 1 and isinstance(ids[0], Sequence):
        ids = ids[0]
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise TypeError(f"the tokenizer gave a {kind(ids)} for {name}; it must give input_ids, a list of int")
    if all(type(token) is int for token in ids):
        return list(ids)
    return [integer(f"an id that the tokenizer gave for {name}", token) for token in ids]


def added_text(tokenizer, before: list[int], ids: list[int]) -> str:
    """Return the text that `ids` add to that of the ids before them, special tokens left out."""
    return decoded_behind(partial(tokenizer.decode, skip_special_tokens=True), before, ids)


def decoded_behind(decode: Callable[[list[int]], str], before: list[int], ids: list[int]) -> str:
    """Return what `ids` add to the text of the ids before them.

    Decoded alone, the first word would lose the space before it in SentencePiece tokenizers. If the text
    before changes (a character that `ids` complete or spoil), only its whole characters count.
    """
    context = before[-_CONTEXT:]
    whole, spoken = decode(context + ids), decode(context)
    for known in (spoken, spoken.rstrip("\ufffd")):
        if whole.startswith(known):
            return whole[len(known) :]
    for token in reversed(context):
        whole, spoken = decode([token, *ids]), decode([token])
        if spoken and "\ufffd" not in spoken and whole.startswith(spoken):
            return whole[len(spoken) :]
    return decode(ids)


def _takes_special_tokens(tokenizer) -> bool:
    try:
        parameters = inspect.signature(tokenizer).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(one.name == "add_special_tokens" or one.kind is one.VAR_KEYWORD for one in parameters)
