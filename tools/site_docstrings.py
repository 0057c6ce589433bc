"""An extension of griffe: arguments that a docstring explains, `name: …`, become a list on the page."""

from __future__ import annotations

import re
from collections.abc import Set

import griffe

_NAMES = r"[a-z]\w*(?:(?:, | and )[a-z]\w*)*"
# At the start of a paragraph, a line or a sentence.
_ARGUMENT = re.compile(rf"(?:(?<=[.;)]) +|(?<=[.;)…])\n|\A)({_NAMES}): (?=\S)")
_SENTENCE_ON_A_LINE = re.compile(r"(?<=\.)\n(?=[A-Z])")


def listed(text: str, known: Set[str] | None) -> str:
    """Return the docstring with a list item for each argument of `known`; None: whatever looks like one."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if p.startswith((" ", "-", "|")) else _itemized(p, known) for p in paragraphs)


def _itemized(paragraph: str, known: Set[str] | None) -> str:
    """Return a paragraph whose arguments are a list; sentences on lines of their own come after it."""
    found = [m for m in _ARGUMENT.finditer(paragraph) if known is None or known.issuperset(_split(m[1]))]
    if not found:
        return paragraph
    ends = [*(match.start() for match in found[1:]), len(paragraph)]
    texts = [paragraph[match.end() : end].strip() for match, end in zip(found, ends, strict=True)]
    texts[-1], *after = _SENTENCE_ON_A_LINE.split(texts[-1], maxsplit=1)
    items = [
        f"- {', '.join(f'`{name}`' for name in _split(match[1]))}: " + text.rstrip(";").replace("\n", "\n  ")
        for match, text in zip(found, texts, strict=True)
    ]
    before = paragraph[: found[0].start()].strip()
    return "\n\n".join(part for part in (before, "\n".join(items), *after) if part)


def _split(names: str) -> list[str]:
    return re.split(r", | and ", names)


def _known(of: griffe.Object) -> Set[str] | None:
    """Return the names that the docstring of a class or function may explain; None: any, for **options."""
    if not isinstance(of, griffe.Function | griffe.Class):
        return frozenset()
    parameters = {parameter.name for parameter in of.parameters}
    if "options" in parameters:
        return None
    return parameters | set(of.members)


class Arguments(griffe.Extension):
    """Rewrites every docstring once."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value, _known(obj))
