"""Results of the benchmarks: what one comparison measured, and the JSON file of a device that keeps them.

The file of a device:
    {"device": "cpu",
     "runs":   {"1": {"date": ..., "machine": {...}, "peaks": {...}}},
     "suites": {"attention": {"block_attention_full": {"run": "1", "title": ..., "ours_seconds": ...}}}}
Every case names the run that measured it, so cases of several machines and commits stand side by side.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy


@dataclasses.dataclass
class Row:
    """One comparison; durations in seconds, in the order in which they were measured.

    title: what was measured, for people. work: flops, dense_flops and bytes of one call.
    scale: the axis of its scaling plot and its place there, ("length", 1024) or ("batch", 8).
    memory: peak bytes of "ours" and of baselines. tokens: completion tokens of one call of each, up to and
    without the end token.
    """

    suite: str
    case: str
    device: str
    ours: list[float]
    baselines: dict[str, list[float]]
    work: dict[str, float | None] = dataclasses.field(default_factory=dict)
    title: str | None = None
    scale: tuple[str, int] | None = None
    memory: dict[str, int | None] = dataclasses.field(default_factory=dict)
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)

    def summary(self) -> dict:
        """Return medians with 20th and 80th percentile; a speedup is the median of the rounds' ratios."""
        baselines = {}
        for name, seconds in self.baselines.items():
            ratios = [theirs / ours for theirs, ours in zip(seconds, self.ours, strict=True)]
            baselines[name] = {
                "seconds": _spread(seconds),
                "speedup": _spread(ratios),
                **self._figures_of(name, seconds),
            }
        summary = {
            "title": self.title or self.case,
            "rounds": len(self.ours),
            "ours_seconds": _spread(self.ours),
            **self._figures_of("ours", self.ours),
            "baselines": baselines,
        }
        median = statistics.median(self.ours)
        summary |= {f"{name}_per_second": amount / median for name, amount in self.work.items() if amount}
        if self.scale is not None:
            summary["axis"], summary["size"] = self.scale
        return summary

    def _figures_of(self, name: str, seconds: list[float]) -> dict:
        figures = {}
        if self.memory.get(name) is not None:
            figures["peak_bytes"] = self.memory[name]
        if name in self.tokens:
            figures["tokens"] = self.tokens[name]
            figures["tokens_per_second"] = self.tokens[name] / statistics.median(seconds)
        return figures


def _spread(values: list[float]) -> dict[str, float]:
    p20, median, p80 = (float(f"{value:.4g}") for value in numpy.percentile(values, [20, 50, 80]))
    return {"median": median, "p20": p20, "p80": p80}


# ---- the file of a device --------------------------------------------------------------------------------
def path_of(folder: Path, device: str) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def read(path: Path) -> dict:
    """Return the content of a device's file. Raises ValueError for a file of another form."""
    content = json.loads(path.read_text())
    if not {"device", "runs", "suites"} <= content.keys():
        raise ValueError(f"{path} holds no results of benchmarks: it must have device, runs and suites")
    return content


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def new_run(machine: dict, peaks: dict[str, float]) -> dict:
    """Return what all rows of this session share."""
    return {"date": datetime.date.today().isoformat(), "machine": machine, "peaks": peaks}


def merged(
    results: dict, run: dict, rows: Iterable[Row], existing: Mapping[str, set[str]] | None = None
) -> dict:
    """Return `results` with `rows`, measured in `run`, in place of older figures of the same cases.

    results: the content of a device's file, or {} for none.
    existing: suite -> the cases that it has today; other cases of that suite are dropped.
    """
    suites = {suite: dict(cases) for suite, cases in results.get("suites", {}).items()}
    for suite, names in (existing or {}).items():
        suites[suite] = {case: figures for case, figures in suites.get(suite, {}).items() if case in names}
    runs = dict(results.get("runs", {}))
    number = _number_of(run, runs)
    runs[number] = run
    for row in rows:
        suites.setdefault(row.suite, {})[row.case] = {"run": number, **row.summary()}
    used = {figures["run"] for cases in suites.values() for figures in cases.values()}
    return {
        "device": run["machine"]["device"],
        "runs": {number: run for number, run in runs.items() if number in used},
        "suites": {suite: cases for suite, cases in suites.items() if cases},
    }


def _number_of(run: dict, runs: dict[str, dict]) -> str:
    """Return the number of an equal run, or the next free one: a number is never given to another run."""
    equal = (number for number, other in runs.items() if other == run)
    return next(equal, str(1 + max(map(int, runs), default=0)))


def in_order(cases: dict[str, dict]) -> list[tuple[str, dict]]:
    """Return (case, figures) by name, numbers in names by their value."""
    return sorted(
        cases.items(), key=lambda item: [_number(part) for part in re.split(r"(\d+)", item[0]) if part]
    )


def _number(part: str) -> tuple[bool, int, str]:
    return (False, int(part), "") if part.isdecimal() else (True, 0, part)
