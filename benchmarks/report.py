"""Report of a benchmark run: a table on the console, and JSON, Markdown, plot and page per device.

python -m benchmarks.report benchmarks/results/cpu.json report.html    # the page of results that are there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import charts, html_page, machine, results, tables

ROWS = pytest.StashKey[list]()
EXISTING = pytest.StashKey[dict]()  # (on a GPU, suite) -> the cases that there are, where all were collected
FOLDER = Path(__file__).parent / "results"


def finish(terminal, config) -> None:
    """Print the table and write what the options ask for; a smoke run writes only what they name."""
    rows: list[results.Row] = config.stash[ROWS]
    if not rows:
        return
    folder, page, own = (config.getoption(name) for name in ("--results", "--report", "--json"))
    smoke = config.getoption("--smoke")
    if folder is None and not (smoke or config.getoption("--no-save")):
        folder = FOLDER
    terminal.section("benchmarks")
    shown, measured = [], {}
    for device in dict.fromkeys(row.device for row in rows):
        here = [row for row in rows if row.device == device]
        run = results.new_run(machine.about(device), {} if smoke else machine.peaks(device))
        _print(terminal, run, here)
        measured[device] = results.merged({}, run, here)
        shown.append(measured[device])
        if folder:
            path = results.path_of(folder, device)
            before = results.read(path) if path.exists() else {}
            shown[-1] = results.merged(before, run, here, _existing(config, device))
            results.write(path, shown[-1])
            for written in (path, *write_beside(path, shown[-1], page is None)):
                terminal.write_line(f"written: {written}")
    if own:
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
        terminal.write_line(f"written: {own}")
    if page:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(html_page.page(shown))
        terminal.write_line(f"written: {page}")


def _print(terminal, run: dict, rows: list[results.Row]) -> None:
    terminal.write_line(", ".join(f"{name} {value}" for name, value in run["machine"].items()))
    for name, unit in (("flops", "GFLOP/s in torch's square product"), ("bytes", "GB/s in a copy")):
        if name in run["peaks"]:
            terminal.write_line(f"peak: {run['peaks'][name] / 1e9:.4g} {unit}")
    for line in tables.console(rows, run["peaks"]):
        terminal.write_line(line)


def _existing(config, device: str) -> dict[str, set[str]]:
    on_gpu = device != "cpu"
    return {suite: cases for (gpu, suite), cases in config.stash[EXISTING].items() if gpu == on_gpu}


def write_beside(path: Path, content: dict, page: bool = True) -> list[Path]:
    """Write the Markdown, the plot and the page of a device's file beside it; return their paths."""
    files = {".md": tables.markdown(content), ".svg": plot(content)}
    if page:
        files[".html"] = html_page.page([content])
    for suffix, text in files.items():
        if text:
            path.with_suffix(suffix).write_text(text)
    return [path.with_suffix(suffix) for suffix, text in files.items() if text]


def plot(content: dict) -> str:
    """Return the scaling plots of a device's file as an SVG file; "" where no case has a place on an axis."""
    drawn = [
        chart for axis in ("length", "batch") for chart in html_page.scaling_charts(content["suites"], axis)
    ]
    width = charts.CURVE_WIDTH + 20
    return charts.standalone(drawn, len(drawn) * width, charts.CURVE_HEIGHT + 10) if drawn else ""


if __name__ == "__main__":
    *sources, target = map(Path, sys.argv[1:])
    target.write_text(html_page.page([results.read(source) for source in sources]))
