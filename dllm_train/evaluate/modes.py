"""Defaults of an evaluation: base or instruct, and the attention that sees both sides of a gap."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_INSTRUCT = re.compile(r"(?<![a-z])(instruct|chat|sft|it|dpo|rlhf)(?![a-z])", re.IGNORECASE)
_BASE = re.compile(r"(?<![a-z])(base|pretrained|pt)(?![a-z])", re.IGNORECASE)


def is_instruct(name: str, tokenizer) -> tuple[bool, str]:
    """Return whether a checkpoint is an instruct checkpoint, and the evidence.

    The name decides ("…-Instruct", "…-Base"), or else the presence of a chat template.
    """
    last = name.rstrip("/").split("/")[-1]
    for pattern, found in ((_INSTRUCT, True), (_BASE, False)):
        if match := pattern.search(last):
            return found, f"its name says {match[0]}"
    if getattr(tokenizer, "chat_template", None):
        return True, "it has a chat template; instruct=false says otherwise"
    return False, "it has no chat template"


@contextmanager
def seeing_both_sides(model, attention: str | None) -> Iterator[None]:
    """Let a model trained for both kinds of attention see past a gap, unless `attention` was given."""
    entry = getattr(model.config, "diffusion", None)
    kinds = list((entry or {}).get("attention", ()))
    if attention is not None or "bidirectional" not in kinds or kinds[0] == "bidirectional":
        yield
        return
    entry["attention"] = ["bidirectional", *(kind for kind in kinds if kind != "bidirectional")]
    try:
        yield
    finally:
        entry["attention"] = kinds
