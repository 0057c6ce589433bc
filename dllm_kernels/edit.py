"""`propose`: rewrite lines of a text by filling a gap of masks between what stands before and behind them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dllm_kernels._arguments import integer
from dllm_kernels.models.text import check_text, check_tokenizer
from dllm_kernels.sampling.api import infill
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.plan import make_plan
from dllm_kernels.sampling.prompts import gapped_text

LENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of gaps that "auto" compares, in lengths of the old lines
OF_NOTHING = (4, 8, 16, 32)  # where the old lines are blank
_CONTEXT_LINES = 3  # of a diff
_SPARE = 16  # positions left for special tokens, and for tokens that joining lines adds


@dataclass(frozen=True)
class Candidate:
    """One filling of the gap. tokens: masks that it had. mean_logprob: of the tokens as they were committed,
    in nats: the bound by which candidates are compared."""

    text: str
    tokens: int
    mean_logprob: float


@dataclass(frozen=True)
class Proposal:
    """text: the whole text with the best candidate in place of the lines. diff: unified, empty if nothing
    changes. candidates: all, the best one first. seen: the first and last line that the model saw."""

    text: str
    diff: str
    candidates: list[Candidate]
    seen: tuple[int, int]


def propose(
    model,
    text: str,
    first: int,
    last: int | None = None,
    *,
    tokenizer,
    tokens: int | str = "auto",
    name: str = "text",
    config: SampleConfig | None = None,
    on_round: Callable | None = None,
    **overrides,
) -> Proposal:
    """Fill lines first..last (from 1, both included; last=None: one line) anew.

    tokens: length of the gap; "auto" fills gaps of several lengths in one batch and takes the one with the
    highest mean log-probability of its tokens. Lines stay as they are, ends included, around the gap; new
    lines end as the others do. A text that is longer than the model's positions is cut at line borders.
    name: of the text in the diff and in errors. Other arguments are those of `dk.infill`.
    """
    check_tokenizer(tokenizer)
    check_text(name, text)
    lines = split_lines(text)
    first = integer("first", first, 1)
    last = integer("last", first if last is None else last, first)
    if last > len(lines):
        raise ValueError(f"{name} has {len(lines)} lines; lines {first}-{last} are not all there")
    plan = make_plan(model, tokenizer, config, overrides)
    ends = "\r\n" if text.count("\r\n") * 2 > text.count("\n") else "\n"
    shown = [line.replace("\r\n", "\n").removeprefix("\ufeff") for line in lines]
    old = "".join(shown[first - 1 : last]).removesuffix("\n")
    limit = plan.diffusion.max_positions
    sizes = _lengths(tokens, old, tokenizer, limit)
    start, stop = _window(shown, first - 1, last, max(sizes), limit, tokenizer, name)
    before = "".join(shown[start : first - 1])
    behind = ("\n" if lines[last - 1].endswith("\n") else "") + "".join(shown[last:stop])
    _refuse_masks(before, behind, tokenizer, plan.mask_id, name)
    output = infill(
        model, [f"{before}<mask:{size}>{behind}" for size in sizes], tokenizer=tokenizer, config=config,
        on_round=on_round, **{**overrides, "logprobs": overrides.get("logprobs") or 0},
    )  # fmt: skip
    candidates = []
    for row, size in enumerate(sizes):
        (span,) = output.filled[row]
        filling = output.texts[row][len(before) : len(output.texts[row]) - len(behind)]
        bound = float(output.logprobs[row, slice(*span)].double().mean())
        candidates.append(Candidate(filling.replace("\r\n", "\n").replace("\n", ends), size, bound))
    candidates.sort(key=lambda candidate: -candidate.mean_logprob)
    changed = _replaced(lines, first, last, candidates[0].text)
    return Proposal("".join(changed), _diff(lines, changed, first, last, name), candidates, (start + 1, stop))


def split_lines(text: str) -> list[str]:
    """Return the lines of a text with their ends; only a line feed ends one."""
    return re.findall("[^\n]*\n|[^\n]+", text)


def _lengths(tokens: int | str, old: str, tokenizer, limit: int | None) -> list[int]:
    """Return the lengths of gaps to try in place of the old lines."""
    if tokens != "auto":
        if isinstance(tokens, str):
            raise ValueError(f'tokens is {tokens!r}; give a number, or "auto"')
        return [integer("tokens", tokens, 1)]
    if not old.strip():
        return list(OF_NOTHING)
    there = max(_count(old, tokenizer), 1)
    sizes = sorted({max(round(there * share), 1) for share in LENGTHS})
    return [size for size in sizes if limit is None or size + _SPARE <= limit] or sizes[:1]


def _count(text: str, tokenizer) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _window(
    lines: list[str], start: int, stop: int, gap: int, limit: int | None, tokenizer, name: str
) -> tuple[int, int]:
    """Return the lines [first, end) around the gap [start, stop) that fit the model beside it.

    Each side gets half of the positions, and what the other one leaves.
    """
    if limit is None:
        return 0, len(lines)
    room = limit - gap - _SPARE
    if room < 0:
        raise ValueError(f"a gap of {gap} tokens in {name} does not fit; the model has {limit} positions")

    def taken(near: Sequence[str], room: int) -> list[int]:
        """Tokens of the lines, nearest first, as far as there is room."""
        counts: list[int] = []
        for line in near:
            if len(line) > 64 * room:
                break  # no tokenizer is read for a line that cannot fit
            counts.append(_count(line, tokenizer))
            if sum(counts) > room:
                counts.pop()
                break
        return counts

    behind = sum(taken(lines[stop:], room))
    before = taken(lines[:start][::-1], max(room - behind, room // 2))
    after = taken(lines[stop:], room - sum(before))
    return start - len(before), stop + len(after)


def _refuse_masks(before: str, behind: str, tokenizer, mask_id: int, name: str) -> None:
    """Refuse text that spells a gap: the model would fill it too."""
    parts = gapped_text(name, f"{before}<mask:1>{behind}", tokenizer, mask_id).parts
    if [part.ids for part in parts if part.text is None] != [[mask_id]]:
        raise ValueError(f"{name} holds the mask token as text near these lines, which would be filled too")


def _replaced(lines: list[str], first: int, last: int, filling: str) -> list[str]:
    """Return the lines with `filling` in place of first..last, whose last end stays."""
    end = re.search("(\r\n|\n)?$", lines[last - 1])[0]
    mark = "\ufeff" if first == 1 and lines[0].startswith("\ufeff") else ""
    return [*lines[: first - 1], *split_lines(mark + filling + end), *lines[last:]]


def _diff(old: list[str], new: list[str], first: int, last: int, name: str) -> str:
    """Return the unified diff of two texts that are alike but for lines first..last of the old one."""
    start = max(first - 1 - _CONTEXT_LINES, 0)
    behind = len(old) - min(last + _CONTEXT_LINES, len(old))
    parts = (lines[start : len(lines) - behind] for lines in (old, new))
    diff = difflib.unified_diff(*parts, f"a/{name}", f"b/{name}", n=_CONTEXT_LINES)
    return "".join(_moved(line, start) if line.startswith("@@ ") else _ended(line) for line in diff)


def _moved(header: str, by: int) -> str:
    """Return the header of a hunk whose line numbers count from `by` lines further up."""

    def moved(found: re.Match) -> str:
        return f"{found[1]}{int(found[2]) + by}"

    return re.sub(r"([-+])(\d+)", moved, header)


def _ended(line: str) -> str:
    return line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
