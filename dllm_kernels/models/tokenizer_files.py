"""The tokenizer of a checkpoint, read with errors that name the file at fault."""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
FILES = (
    *VOCABULARIES, "merges.txt", "spiece.model", "sentencepiece.bpe.model", "added_tokens.json",
    "special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def read_tokenizer(folder: Path, config, kind: str | None):
    """Return the tokenizer of a checkpoint, None if it has none.

    kind: the transformers class that reads it; None: its files say. No code of the checkpoint is run.
    """
    import transformers

    if not any((folder / file).is_file() for file in VOCABULARIES):
        return None
    found = [folder / file for file in FILES if (folder / file).is_file()]
    for path in found:
        _check(path)
    try:
        if kind is not None:
            tokenizer = getattr(transformers, kind).from_pretrained(folder)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, config=config, trust_remote_code=False
            )
        tokenizer.get_vocab()
    except BaseException as error:  # transformers and its Rust tokenizers, whose panics are not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"the tokenizer of {folder} cannot be read from {names} ({type(error).__name__}: {error})"
        ) from error
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str | dict | None):
        raise ValueError(
            f"the tokenizer of {folder} cannot be read: its chat_template is a {type(template).__name__}"
        )
    return tokenizer


def _check(path: Path) -> None:
    """Refuse invalid JSON, and JSON whose top level no tokenizer's file has."""
    if path.suffix not in (".json", ".jinja", ".txt"):
        return
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if path.suffix == ".json" else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the tokenizer of {path.parent} cannot be read: {path} is broken: {error}"
        ) from None
    if not isinstance(entries, dict):
        kind = type(entries).__name__
        raise ValueError(
            f"the tokenizer of {path.parent} cannot be read: {path} holds a {kind}, not entries by name"
        )
