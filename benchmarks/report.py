"""Results of the benchmarks: a JSON file and a plot per device, and a table at the end of the run."""

import dataclasses
import datetime
import json
import re
import statistics
from pathlib import Path

import numpy
import pytest

from benchmarks import machine, plot

ROWS = pytest.StashKey[list]()
FOLDER = Path(__file__).parent / "results"


@dataclasses.dataclass
class Row:
    """One comparison; durations in seconds, in the order in which they were measured."""

    suite: str
    case: str
    device: str
    ours: list[float]
    baselines: dict[str, list[float]]
    work: dict[str, float | None]  # flops, dense_flops, bytes of one call
    size: int | None = None  # place on the plot's axis
    memory: dict[str, int | None] = dataclasses.field(default_factory=dict)  # peak bytes: "ours", baselines

    def summary(self) -> dict:
        """Medians with 20th and 80th percentile; a speed-up is taken within each round, then its median."""
        median = statistics.median(self.ours)
        baselines = {}
        for name, seconds in self.baselines.items():
            ratios = [theirs / ours for theirs, ours in zip(seconds, self.ours, strict=True)]
            baselines[name] = {"seconds": _spread(seconds), "speedup": _spread(ratios)}
            if self.memory.get(name) is not None:
                baselines[name]["peak_bytes"] = self.memory[name]
        summary = {"rounds": len(self.ours), "ours_seconds": _spread(self.ours)}
        summary |= {f"{name}_per_second": amount / median for name, amount in self.work.items() if amount}
        if self.size is not None:
            summary["size"] = self.size
        if self.memory.get("ours") is not None:
            summary["peak_bytes"] = self.memory["ours"]
        return summary | {"baselines": baselines}


def _spread(values: list[float]) -> dict[str, float]:
    p20, median, p80 = (float(f"{value:.4g}") for value in numpy.percentile(values, [20, 50, 80]))
    return {"median": median, "p20": p20, "p80": p80}


def finish(terminal, config) -> None:
    """Writes the results (not those of a smoke run) and prints the table."""
    rows: list[Row] = config.stash[ROWS]
    if not rows:
        return
    smoke = config.getoption("--smoke")
    folder = config.getoption("--results") or (None if smoke else FOLDER)
    terminal.section("benchmarks")
    for device in dict.fromkeys(row.device for row in rows):
        about = machine.about(device)
        where = "cpu" if device == "cpu" else "cuda"
        peaks = {} if smoke else {"flops": machine.peak_flops(where), "bytes": machine.peak_bandwidth(where)}
        here = [row for row in rows if row.device == device]
        terminal.write_line(", ".join(f"{name} {value}" for name, value in about.items()))
        for name, unit in (("flops", "GFLOP/s in torch's square product"), ("bytes", "GB/s in a copy")):
            if name in peaks:
                terminal.write_line(f"peak: {peaks[name] / 1e9:.4g} {unit}")
        for line in table(here, peaks):
            terminal.write_line(line)
        if folder:
            for path in write(folder, about, peaks, here):
                terminal.write_line(f"written: {path}")


def write(folder: Path, about: dict, peaks: dict, rows: list[Row]) -> list[Path]:
    """Merges rows into the device's file and draws its plot. Other suites stay; of a suite that is measured
    again only cases of the same machine, versions and commit do."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-") + ".json")
    results = json.loads(path.read_text()) if path.exists() else {}
    today = datetime.date.today().isoformat()
    for suite in dict.fromkeys(row.suite for row in rows):
        before = results.get(suite, {})
        cases = before["cases"] if before.get("machine") == about else {}
        cases |= {row.case: row.summary() for row in rows if row.suite == suite}
        results[suite] = {"date": today, "machine": about, "peaks": peaks, "cases": cases}
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    partial.replace(path)
    return [path, *plot.draw(results, path.with_suffix(".svg"))]


def table(rows: list[Row], peaks: dict[str, float]) -> list[str]:
    """Lines of text: time, rates and their share of the peak; below, every baseline with the ratio."""
    width = max(len(name) for row in rows for name in (row.case, *(f"vs {other}" for other in row.baselines)))
    lines = []
    for row in rows:
        summary = row.summary()
        line = f"{row.case:{width}}  {_time(summary['ours_seconds'])}"
        for name, unit in (("flops", "GFLOP/s"), ("bytes", "GB/s")):
            if row.work.get(name):
                rate = summary[f"{name}_per_second"]
                line += f"  {rate / 1e9:.4g} {unit}"
                line += f" ({rate / peaks[name]:.0%} of peak)" if name in peaks else ""
        lines.append(line + _megabytes(summary))
        for name, other in summary["baselines"].items():
            ratio = other["speedup"]
            spread = f"{ratio['median']:.2f}x [{ratio['p20']:.2f}, {ratio['p80']:.2f}]"
            lines.append(f"{'vs ' + name:>{width}}  {_time(other['seconds'])}  {spread}{_megabytes(other)}")
    return lines


def _time(spread: dict[str, float]) -> str:
    low, middle, high = (spread[name] * 1e6 for name in ("p20", "median", "p80"))
    scale, unit = (1e3, "ms") if middle >= 1e3 else (1, "µs")
    return f"{middle / scale:9.2f} {unit} [{low / scale:.2f}, {high / scale:.2f}]"


def _megabytes(figures: dict) -> str:
    return f"  peak {figures['peak_bytes'] / 1e6:.1f} MB" if "peak_bytes" in figures else ""
