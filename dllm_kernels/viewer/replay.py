"""A recorded run as one HTML file: a slider through its steps, a heat map, the alternatives of each token."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from dllm_kernels._arguments import integer
from dllm_kernels.models.text import check_tokenizer, decoded_behind
from dllm_kernels.sampling.output import SampleOutput

MASK = -1  # in place of the number of a text
MOST_RUNS = 2
_CONTEXT = 4  # tokens before one that its spelling depends on: a space, or the bytes of a character
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so byte-level tokens, of one character
_SHOWN_AS_IS = "\n\t\u200c\u200d"  # joiners change the shape of letters and emoji, not the order of text
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories without a shape of their own


def write_replay(
    path: str | os.PathLike,
    runs: Mapping[str, SampleOutput],
    tokenizer,
    *,
    mask_id: int,
    row: int = 0,
) -> None:
    """Write one row of one or two runs as an HTML page that needs no network and no other file.

    runs: outputs by the name to show, two of them side by side. Record them with logprobs=k for the colours
    by probability and the k alternatives of each token, and with history=True for the tokens that rule "edit"
    replaced. The file appears complete or not at all; one that stands there is replaced.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"path is {str(path)!r}; it must name a file in a folder that exists")
    page = replay_page(runs, tokenizer, mask_id=mask_id, row=row)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def replay_page(runs: Mapping[str, SampleOutput], tokenizer, *, mask_id: int, row: int = 0) -> str:
    """Return the page that `write_replay` writes."""
    if not isinstance(runs, Mapping):
        raise TypeError(
            f"runs is a {type(runs).__name__}; it must map names to outputs of dk.sample or dk.infill"
        )
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"runs holds {len(runs)} outputs; allowed: 1 or {MOST_RUNS}")
    check_tokenizer(tokenizer)
    for name, output in runs.items():
        integer(f"row of {name!r}", row, 0, len(output.sequences) - 1)
    texts = _Numbers()
    recorded = [_recorded(name, output, row, tokenizer, mask_id, texts) for name, output in runs.items()]
    finished = "".join(
        f"<h2>{html.escape(run['name'])}</h2><pre>{html.escape(_final_text(run, list(texts)))}</pre>"
        for run in recorded
    )
    parts = {
        suffix: files(__package__).joinpath(f"replay.{suffix}").read_text()
        for suffix in ("html", "css", "js")
    }
    fields = {
        "title": html.escape(" / ".join(run["name"] for run in recorded)),
        "finished": finished,
        "recording": _in_script({"texts": list(texts), "runs": recorded}),
        "style": parts["css"],
        "style-hash": _hash(parts["css"]),
        "script": parts["js"],
        "script-hash": _hash(parts["js"]),
    }
    first, *rest = parts["html"].split("{{")
    pieces = (piece.partition("}}") for piece in rest)
    return first + "".join(fields[name] + behind for name, _, behind in pieces)


def visible(text: str) -> str:
    """Return `text` with a picture or the number of every character that is not seen itself."""
    return "".join(
        character if character in _SHOWN_AS_IS or unicodedata.category(character) not in _HIDDEN
        else chr(0x2400 + ord(character)) if ord(character) < 0x20
        else f"‹U+{ord(character):04X}›"
        for character in text
    )  # fmt: skip


class _Numbers(dict):
    """Texts and their numbers, in the order in which they were first asked for."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


def _recorded(name: str, output: SampleOutput, row: int, tokenizer, mask_id: int, texts: _Numbers) -> dict:
    """Return one run as the page's script reads it.

    initial: of each position the number of its text, or MASK. writes: of each step its [position, text].
    probabilities: of each position, None where given. alternatives: of each its [text, probability].
    """
    end = _shown(output, row, tokenizer)
    tokens = output.sequences[row, :end].tolist()
    spell = cache(lambda before, token_ids: decoded_behind(tokenizer.decode, list(before), list(token_ids)))

    def decode(before: list[int], token_ids: list[int]) -> str:
        return spell(tuple(before), tuple(token_ids))

    final = _pieces(tokens, mask_id, decode)
    initial, writes = _states(output, row, end, mask_id)

    def number(position: int, token: int) -> int:
        if token == mask_id:
            return MASK
        if token == tokens[position]:
            return texts[visible(final[position])]
        return texts[visible(decode(_behind(tokens, position, mask_id), [token]))]

    probabilities = alternatives = None
    if output.logprobs is not None:
        given = (output.unmask_step[row, :end] < 0).tolist()
        logprobs = output.logprobs[row, :end].tolist()
        probabilities = [None if kept else _probability(x) for kept, x in zip(given, logprobs, strict=True)]
    if output.top_logprobs is not None:
        ids, logprobs = (values[row, :end].tolist() for values in output.top_logprobs)
        alternatives = [
            []
            if kept
            else [[number(position, i), _probability(x)] for i, x in zip(*top, strict=True) if i >= 0]
            for position, (kept, *top) in enumerate(zip(given, ids, logprobs, strict=True))
        ]
    return {
        "name": visible(str(name)),
        "initial": [number(position, token) for position, token in enumerate(initial)],
        "writes": [[[position, number(position, token)] for position, token in step] for step in writes],
        "probabilities": probabilities,
        "alternatives": alternatives,
    }


def _shown(output: SampleOutput, row: int, tokenizer) -> int:
    """Return the end of what a row shows: behind its last token that was written, or given and no filling."""
    written = (output.unmask_step[row] >= 0).nonzero()
    last = int(written[-1]) + 1 if len(written) else 0
    tokens = output.sequences[row].tolist()
    if output.filled is None and last:
        return last
    special = set(getattr(tokenizer, "all_special_ids", ()))
    end = len(tokens)
    while end > last and tokens[end - 1] in special:
        end -= 1
    return end


def _states(
    output: SampleOutput, row: int, end: int, mask_id: int
) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Return a row's canvas at the start, and what each of its steps wrote: positions and token ids."""
    steps = int(output.row_forwards[row])
    if output.history is not None:
        canvases = [canvas[row, :end].tolist() for canvas in output.history]
        changes = [
            [(position, token) for position, token in enumerate(after) if token != before[position]]
            for before, after in pairwise(canvases)
        ]
        # A row that waited for others took part in no round before the first that changed it.
        first = next((index for index, change in enumerate(changes) if change), 0)
        return canvases[0], changes[first : first + steps]
    tokens, step = output.sequences[row, :end].tolist(), output.unmask_step[row, :end].tolist()
    initial = [token if wrote < 0 else mask_id for token, wrote in zip(tokens, step, strict=True)]
    writes = [[] for _ in range(max([steps, *(wrote + 1 for wrote in step)]))]
    for position, wrote in enumerate(step):
        if wrote >= 0:
            writes[wrote].append((position, tokens[position]))
    return initial, writes


def _pieces(tokens: list[int], mask_id: int, decode: Callable[[list[int], list[int]], str]) -> list[str]:
    """Return what each token adds to the text of those before it, "" for masks.

    A character of several tokens stands with the last of them.
    """
    pieces, start = [], 0
    for end in range(1, len(tokens) + 1):
        text = decode(_behind(tokens, start, mask_id), _written(tokens[start:end], mask_id))
        unfinished = text.endswith("\ufffd") and end - start < _LONGEST_CHARACTER
        if unfinished and end < len(tokens) and tokens[end] != mask_id:
            continue
        pieces += [""] * (end - start - 1) + [text]
        start = end
    return pieces


def _behind(tokens: list[int], position: int, mask_id: int) -> list[int]:
    """Return the tokens before a position that its spelling may depend on."""
    return _written(tokens[max(position - _CONTEXT, 0) : position], mask_id)


def _written(tokens: list[int], mask_id: int) -> list[int]:
    return [token for token in tokens if token != mask_id]


def _final_text(run: dict, texts: list[str]) -> str:
    final = list(run["initial"])
    for step in run["writes"]:
        for position, text in step:
            final[position] = text
    return "".join("░" if text == MASK else texts[text] for text in final)


def _probability(logprob: float) -> float | None:
    return float(f"{math.exp(min(logprob, 0.0)):.4g}") if not math.isnan(logprob) else None


def _in_script(value: object) -> str:
    """Return `value` as JSON in ASCII that neither ends nor opens a script, a comment or an entity."""
    encoded = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return encoded


def _hash(text: str) -> str:
    """Return what a Content-Security-Policy knows an inline text by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
