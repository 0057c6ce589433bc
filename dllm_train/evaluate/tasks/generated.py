"""Documents of the offline tasks, from generated additions and the held-out files of the standard library."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache

import datasets
import numpy as np

from dllm_kernels.models.checkpoint import load_tokenizer
from dllm_train.recipes.tiny_python import arithmetic as additions
from dllm_train.recipes.tiny_python.data import collect_sources, split

EXAMPLES = 64  # additions to draw few-shot examples from
GAPS, GAPS_OF_ONE = 200, 3  # lines to fill, in all and of one function or class
MOST_TOKENS = 24  # of a line to fill
SHORTEST, LONGEST = 4, 30  # lines of a function or class
MOST_BYTES = 1500  # of a beginning, and of a function or class


def arithmetic(**metadata) -> dict[str, datasets.Dataset]:
    """Return every held-out pair as the split test, and pairs of the training data as train."""
    rng = np.random.default_rng(0)
    train = [additions.training_pair(rng) for _ in range(EXAMPLES)]
    return {"train": _additions(train), "test": _additions(additions.held_out_pairs())}


def gaps(pretrained=None, tokenizer=None, **metadata) -> dict[str, datasets.Dataset]:
    """Return functions and classes with a line left out: before, line, after, and all as `gapped`.

    pretrained, tokenizer: as in model_args; the length of a gap is counted in tokens. The lines of a
    function are drawn by its location.
    """
    if pretrained is None and tokenizer is None:
        raise ValueError("python_infill counts tokens; give pretrained= or tokenizer= in --model_args")
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer or pretrained)
    if tokenizer is None:
        raise ValueError(f"python_infill counts tokens, and {pretrained} has no tokenizer")
    found = []
    for place, text in _definitions():
        lines = text.split("\n")
        candidates = [index for index in range(1, len(lines)) if lines[index].strip()]
        rng = np.random.default_rng([*hashlib.sha256(place.encode()).digest()])
        for index in rng.permutation(candidates)[:GAPS_OF_ONE].tolist():
            before, line = "\n".join([*lines[:index], ""]), lines[index]
            after = "\n".join(["", *lines[index + 1 :]])
            count = _tokens(tokenizer, before + line) - _tokens(tokenizer, before)
            if 1 <= count <= MOST_TOKENS and "<mask:" not in text:
                gapped = f"{before}<mask:{count}>{after}"
                found.append(dict(place=place, before=before, line=line, after=after, gapped=gapped))
    if not found:
        raise ValueError("python_infill found no functions in the held-out files of the standard library")
    places = np.linspace(0, len(found) - 1, min(GAPS, len(found))).astype(int)
    return {"test": datasets.Dataset.from_list([found[place] for place in places])}


def score_line(document: dict, results: list[str]) -> dict[str, float]:
    """Return whether the filled line is the one left out, and whether the text with it parses."""
    try:
        ast.parse(document["before"] + results[0] + document["after"])
        parses = True
    except (SyntaxError, ValueError):
        parses = False
    return {"exact_line": float(results[0] == document["line"]), "parses": float(parses)}


def beginnings(**metadata) -> dict[str, datasets.Dataset]:
    """Return the whole lines in the first 1500 bytes of every held-out file."""
    found = []
    for document in _held_out():
        head = document.text.encode()[:MOST_BYTES].decode(errors="ignore")
        text = head[: head.rfind("\n") + 1]
        if text.strip():
            found.append(dict(place=document.path, text=text))
    return {"test": datasets.Dataset.from_list(found)}


def _additions(pairs: list[tuple[int, int]]) -> datasets.Dataset:
    rows = []
    for a, b in pairs:
        prompt = additions.prompt(a, b)
        rows.append(dict(prompt=prompt, answer=additions.line(a, b).removeprefix(prompt).rstrip("\n")))
    return datasets.Dataset.from_list(rows)


@cache
def _held_out() -> list:
    return split(collect_sources())[1]


def _definitions() -> Iterator[tuple[str, str]]:
    """Yield (location, text) of the functions and classes at the top of held-out files."""
    for document in _held_out():
        lines = document.text.split("\n")
        for node in ast.parse(document.text).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            text = "\n".join([*lines[first - 1 : node.end_lineno], ""])
            count = node.end_lineno - first + 1
            if SHORTEST <= count <= LONGEST and len(text.encode()) <= MOST_BYTES:
                yield f"{document.path}:{first}", text


def _tokens(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
