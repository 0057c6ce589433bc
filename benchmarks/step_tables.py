"""docs/performance.json, which `benchmarks.step_parts` writes, as tables and a plot."""

from __future__ import annotations

from benchmarks import charts
from benchmarks.step_parts import PARTS, STOCK
from benchmarks.tables import duration, grid, machine, percent

NAMES = {STOCK: "stock layers, float32"}


def steps(figures: dict, section: str = "steps") -> str:
    """Return a table of a step's time by part for each kind of weights, and what was measured where.

    section: "steps", or "avx2", where neither side used AVX-512.
    """
    figures = figures[section]
    stock = figures["seconds"][STOCK]["all"]
    rows = [
        [
            NAMES.get(kind, f"`{kind}`"),
            duration(step["all"]),
            "" if kind == STOCK else f"{stock / step['all']:.2f}×",
            *(duration(step[part]) for part in PARTS),
        ]
        for kind, step in figures["seconds"].items()
    ]
    return (
        f"{grid(['weights', 'step', 'faster', *PARTS], rows)}\n\n{figures['block']} tokens of a canvas of "
        f"{figures['canvas']}, {figures['model']} model, dual cache. {_measured_on(figures)}\n"
    )


def limits(figures: dict) -> str:
    """Return a table of the rates that the products of a step reach beside those of the machine."""
    figures = figures["steps"]
    peaks, rows = figures["peaks"], []
    for kind, step in figures["seconds"].items():
        for part, work in figures["moved"][kind].items():
            read, computed = work["bytes"] / step[part], work["operations"] / step[part]
            rows.append(
                [
                    NAMES.get(kind, f"`{kind}`"),
                    part,
                    f"{read / 1e9:.3g} GB/s ({percent(read / peaks['bytes'])})",
                    f"{computed / 1e9:.3g} GFLOP/s ({percent(computed / peaks['flops'])})",
                ]
            )
    return (
        f"{grid(['weights', 'part', 'weights read', 'computed'], rows)}\n\nIn brackets: of a copy of memory, "
        f"{peaks['bytes'] / 1e9:.3g} GB/s, and of a square product in float32, {peaks['flops'] / 1e9:.3g} "
        f"GFLOP/s, on the same machine. {_measured_on(figures)}\n"
    )


def threads(figures: dict) -> str:
    """Return a table of a step's time by the number of threads."""
    seconds = figures["threads"]["seconds"]
    rows = [
        [NAMES.get(kind, f"`{kind}`"), *(duration(seconds[count][kind]) for count in seconds)]
        for kind in next(iter(seconds.values()))
    ]
    columns = ["weights", *(f"{count} thread{'s' * (count != '1')}" for count in seconds)]
    return f"{grid(columns, rows)}\n\n{_measured_on(figures['threads'])}\n"


def threads_plot(figures: dict) -> str:
    """Return the same as an SVG file."""
    seconds = figures["threads"]["seconds"]
    lines = [
        charts.Curve(
            NAMES.get(kind, kind),
            [(int(count), step[kind], step[kind], step[kind]) for count, step in seconds.items()],
        )
        for kind in next(iter(seconds.values()))
    ]
    chart = charts.curves("A step by the number of threads", "threads", lines, duration)
    return charts.standalone([chart], charts.CURVE_WIDTH + 20, charts.CURVE_HEIGHT + 10)


def accuracy(figures: dict) -> str:
    """Return a table of speed beside accuracy for each kind of weights."""
    seconds = figures["steps"]["seconds"]
    rows = [
        [
            NAMES.get(kind, f"`{kind}`"),
            f"{seconds[STOCK]['all'] / seconds[kind]['all']:.2f}×",
            f"{found['bits_per_byte']:.4f}",
            f"{found['additions']:.1%}",
            f"{found['infilled']:.1%}",
            f"{found['agreement']:.1%}",
        ]
        for kind, found in figures["accuracy"]["figures"].items()
    ]
    columns = ["weights", "step", "bits per byte", "exact additions", "exact infilled lines", "agreement"]
    return (
        f"{grid(columns, rows)}\n\nSteps: of the {figures['steps']['model']} model above. Accuracy: of "
        "tiny-python on held-out data; agreement: tokens of completed code up to the first that differs from "
        f"those of stock layers. {_measured_on(figures['accuracy'])}\n"
    )


def _measured_on(figures: dict) -> str:
    return f"Measured on {machine(figures['machine'])}."
