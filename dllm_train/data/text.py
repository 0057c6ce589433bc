"""Checks of texts, tokens and lengths; errors name the dataset, the row and the field."""

import hashlib
import json

from dllm_kernels._arguments import integer


def text_of(value: object, field: str, row: int, name: str) -> str:
    """Return a text field of a row; a list of text parts ({"type": "text", "text": ...}) is joined."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        kinds = {part.get("type") for part in value} - {"text"}
        if kinds:
            raise ValueError(
                f"row {row} of {name}: {field!r} holds a part of type {sorted(map(str, kinds))[0]!r}; "
                "only text is supported"
            )
        value = "".join(text_of(part.get("text"), field, row, name) for part in value)
    if not isinstance(value, str):
        kind = "missing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"row {row} of {name}: {field!r} is {kind}; expected text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"row {row} of {name}: {field!r} has the lone surrogate {value[error.start]!r} at character "
                f"{error.start}, which no tokenizer can read"
            ) from error
    return value


def check_tokens(tokenizer, ids: list[int], row: int, name: str) -> None:
    """Raise ValueError when a text spells out the mask token, which the losses keep for noise."""
    mask_id = getattr(tokenizer, "mask_token_id", None)
    if mask_id is not None and mask_id in ids:
        raise ValueError(
            f"row {row} of {name}: the text contains the mask token, {tokenizer.mask_token!r}; remove the "
            "row or replace that string"
        )


def check_length(max_length: int, block_size: int | None) -> int:
    """Return max_length, which must hold whole blocks."""
    max_length = integer("max_length", max_length, 1)
    if block_size is not None and max_length % integer("block_size", block_size, 1):
        raise ValueError(f"max_length is {max_length}; expected a multiple of block_size, {block_size}")
    return max_length


def end_token(tokenizer) -> int:
    """Return the id of the end token."""
    if tokenizer.eos_token_id is None:
        raise ValueError("insert_eos needs an eos_token, and the tokenizer has none; set tokenizer.eos_token")
    return tokenizer.eos_token_id


def first_token(tokenizer) -> int:
    """Return the id of the BOS token."""
    if tokenizer.bos_token_id is None:
        raise ValueError("insert_bos needs a bos_token, and the tokenizer has none; set tokenizer.bos_token")
    return tokenizer.bos_token_id


def tokenizer_digest(tokenizer) -> str:
    """Return a hash of the vocabulary, the special tokens and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if backend is not None:  # padding and truncation are settings of the last call
        rules |= {"padding": None, "truncation": None}
    parts = [rules, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
