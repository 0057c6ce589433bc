"""Results of the benchmarks: one JSON file per suite and device, and a table at the end of the run."""

import dataclasses
import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

import dllm_kernels
from dllm_kernels import _library  # noqa: F401  (loads the operators)

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

    def summary(self) -> dict:
        """Medians with 20th and 80th percentile; a speed-up is taken within each round, then its median."""
        median = statistics.median(self.ours)
        return {
            "rounds": len(self.ours),
            "ours_seconds": _spread(self.ours),
            **{f"{name}_per_second": amount / median for name, amount in self.work.items() if amount},
            "baselines": {
                name: {
                    "seconds": _spread(seconds),
                    "speedup": _spread(
                        [theirs / ours for theirs, ours in zip(seconds, self.ours, strict=True)]
                    ),
                }
                for name, seconds in self.baselines.items()
            },
        }


def _spread(values: list[float]) -> dict[str, float]:
    p20, median, p80 = (float(f"{value:.4g}") for value in numpy.percentile(values, [20, 50, 80]))
    return {"median": median, "p20": p20, "p80": p80}


def machine(device: str) -> dict:
    """What the figures depend on."""
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.ops.dllm_kernels.isa_active(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dllm_kernels": dllm_kernels.__version__,
        "commit": commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


@functools.cache
def commit() -> str:
    """Short hash, with a + when files other than results differ from it; or what DLLM_COMMIT says."""
    if os.environ.get("DLLM_COMMIT"):
        return os.environ["DLLM_COMMIT"]
    git = ["git", "-C", str(FOLDER.parent.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"], capture_output=True, text=True
    )
    return head.stdout.strip() + "+" * bool(changed.stdout.strip()) if head.returncode == 0 else "unknown"


def finish(terminal, config) -> None:
    """Writes the results (not those of a smoke run) and prints the table."""
    rows: list[Row] = config.stash[ROWS]
    if not rows:
        return
    folder = config.getoption("--results") or (None if config.getoption("--smoke") else FOLDER)
    terminal.section("benchmarks")
    for device in dict.fromkeys(row.device for row in rows):
        about = machine(device)
        here = [row for row in rows if row.device == device]
        terminal.write_line(", ".join(f"{name} {value}" for name, value in about.items()))
        for line in table(here):
            terminal.write_line(line)
        for suite in dict.fromkeys(row.suite for row in here) if folder else ():
            path = write(folder, about, [row for row in here if row.suite == suite])
            terminal.write_line(f"written: {path}")


def write(folder: Path, about: dict, rows: list[Row]) -> Path:
    """Merges rows of one suite into its file; rows of another machine, version or commit are dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = folder / f"{rows[0].suite}.{device}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    cases = before["cases"] if before.get("machine") == about else {}
    cases |= {row.case: row.summary() for row in rows}
    today = datetime.date.today().isoformat()
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps({"date": today, "machine": about, "cases": cases}, indent=1) + "\n")
    partial.replace(path)
    return path


def table(rows: list[Row]) -> list[str]:
    width = max(len(row.case) for row in rows)
    lines = []
    for row in rows:
        summary = row.summary()
        rates = "".join(
            f"  {summary[f'{name}_per_second'] / 1e9:.4g} {unit}"
            for name, unit in (("flops", "GFLOP/s"), ("bytes", "GB/s"))
            if row.work.get(name)
        )
        lines.append(f"{row.case:{width}}  {_time(summary['ours_seconds'])}{rates}")
        for name, other in summary["baselines"].items():
            ratio = other["speedup"]
            spread = f"{ratio['median']:.2f}x [{ratio['p20']:.2f}, {ratio['p80']:.2f}]"
            lines.append(f"{'vs ' + name:>{width}}  {_time(other['seconds'])}  {spread}")
    return lines


def _time(spread: dict[str, float]) -> str:
    low, middle, high = (spread[name] * 1e6 for name in ("p20", "median", "p80"))
    scale, unit = (1e3, "ms") if middle >= 1e3 else (1, "µs")
    return f"{middle / scale:9.2f} {unit} [{low / scale:.2f}, {high / scale:.2f}]"
