"""Charts as SVG text: bars of speedups and shares, curves over length or batch.

A chart has no colors of its own: `STYLE` gives them, for light and dark. A page includes it once, and
`standalone` puts it into the file. All text is escaped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH = 860
LABELS, WIDE_LABELS = 270, 450  # widths of the column of names: below a heading, and where it is the heading
VALUES = 185  # width of the column of values
ROW, HEADER = 22, 26  # heights
CURVE_WIDTH, CURVE_HEIGHT = 430, 300
CROWDED = 300  # a logarithmic axis over more than this has no ticks but powers of ten
SERIES = 6  # colors of curves, ours the first

STYLE = """
:root { --surface: #fbfbfa; --ink: #1b1b19; --muted: #62615c; --grid: #e3e2dd; --axis: #8b8a84;
  --c0: #1f6fd0; --c1: #c2571a; --c2: #12806b; --c3: #8a4fb5; --c4: #a67c00; --c5: #b8336a;
  --slower: #c2571a; }
@media (prefers-color-scheme: dark) { :root { --surface: #191918; --ink: #f2f1ec; --muted: #a9a8a1;
  --grid: #343432; --axis: #7d7c76; --c0: #5a9df0; --c1: #e88b52; --c2: #3fb79c; --c3: #bd8ae6;
  --c4: #d4a93a; --c5: #e773a3; --slower: #e88b52; } }
svg.chart { font: 12px system-ui, sans-serif; fill: var(--ink); }
.chart .muted { fill: var(--muted); }
.chart .name { font-weight: 600; paint-order: stroke; stroke: var(--surface); stroke-width: 4px; }
.chart .grid { stroke: var(--grid); } .chart .axis { stroke: var(--axis); }
.chart .spread { stroke: var(--ink); stroke-opacity: .55; stroke-width: 1.5; }
.chart .ours { fill: var(--c0); } .chart .slower { fill: var(--slower); }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; } .chart .band { opacity: .15; }
"""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar: its name, its value, the text beside it, and the spread around the value if there is one."""

    name: str
    value: float
    text: str
    spread: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line: its name and points (x, y, low, high)."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


def standalone(charts: Sequence[str], width: int, height: int) -> str:
    """Return an SVG file with `charts` side by side on a background of its own."""
    step = width / len(charts)
    inner = "".join(
        f'<g transform="translate({n * step:.0f} 0)">{chart}</g>' for n, chart in enumerate(charts)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height}" style="fill: var(--surface)"/>{inner}</svg>\n'
    )


# ---- bars ------------------------------------------------------------------------------------------------
def speedup_bars(groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Return bars on a logarithmic axis that grow from 1×: to the right where ours is faster."""
    values = [end for _, bars in groups for bar in bars for end in (bar.value, *(bar.spread or ()))]
    low, high = min(0.9, *values), max(2.0, *values)
    place = _log_place(low, high, LABELS, WIDTH - VALUES)
    factors = (1,) if high / low > CROWDED else (1, 2, 5)
    values = (factor * 10.0**power for power in range(-4, 7) for factor in factors)
    ticks = [(place(value), f"{value:g}×") for value in values if low <= value <= high]
    return _bars(groups, place, ticks, origin=1.0, labels=LABELS)


def share_bars(groups: Sequence[tuple[str | None, Sequence[Bar]]]) -> str:
    """Return bars on a linear axis from 0 to at least 100%; a group named None has no heading."""
    high = max(1.0, *(bar.value for _, bars in groups for bar in bars))
    labels = LABELS if any(name is not None for name, _ in groups) else WIDE_LABELS
    left, right = labels, WIDTH - VALUES

    def place(value: float) -> float:
        return left + (right - left) * value / high

    step = 0.25 if high <= 2 else 10 ** math.ceil(math.log10(high / 5))
    ticks = [(place(step * n), f"{step * n:.0%}") for n in range(int(high / step + 1e-9) + 1)]
    return _bars(groups, place, ticks, origin=0.0, labels=labels)


def _bars(groups, place: Callable[[float], float], ticks, origin: float, labels: int) -> str:
    """Draw `groups` below each other, each under its heading."""
    parts, y = [], 24
    for name, bars in groups:
        if name is not None:
            parts.append(f'<text class="name" x="0" y="{y + 17}">{escape(_shortened(name, 108))}</text>')
            y += HEADER
        for bar in bars:
            parts.append(_bar(bar, place, origin, y, labels))
            y += ROW
        y += 6 if name is not None else 0
    lines = []
    for x, text in ticks:
        kind = "axis" if abs(x - place(origin)) < 0.5 else "grid"
        lines.append(
            f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="{y}"/>'
            f'<text class="muted" x="{x:.1f}" y="14" text-anchor="middle">{text}</text>'
        )
    return _svg(WIDTH, y, [*lines, *parts])


def _bar(bar: Bar, place: Callable[[float], float], origin: float, y: float, labels: int) -> str:
    start, end = place(origin), place(bar.value)
    x, width = min(start, end), max(abs(end - start), 1)
    kind = "slower" if bar.value < origin else "ours"
    middle = y + ROW / 2
    spread, right = "", max(start, end)
    if bar.spread is not None:
        low, high = (place(value) for value in bar.spread)
        right = max(right, high)
        spread = f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
    return (
        f"<g><title>{escape(f'{bar.name}: {bar.text}')}</title>"
        f'<text class="muted" x="{labels - 10}" y="{middle + 4}" text-anchor="end">'
        f"{escape(_shortened(bar.name, labels * 3 // 20))}</text>"
        f'<rect class="{kind}" x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{ROW - 8}" rx="2"/>'
        f"{spread}"
        f'<text x="{right + 6:.1f}" y="{middle + 4}">{escape(bar.text)}</text></g>'
    )


# ---- curves ----------------------------------------------------------------------------------------------
def curves(title: str, axis: str, lines: Sequence[Curve], unit: Callable[[float], str]) -> str:
    """Return curves with logarithmic axes; bands reach from low to high. `unit` writes a y value."""
    points = [point for line in lines for point in line.points]
    sizes = sorted({point[0] for point in points})
    left, right, top, bottom = 62, CURVE_WIDTH - 112, 44, CURVE_HEIGHT - 40
    x = _log_place(sizes[0], sizes[-1], left + 8, right)
    low, high = min(point[2] for point in points), max(point[3] for point in points)
    y = _log_place(low, high, bottom - 6, top + 6)
    parts = [f'<text class="name" x="0" y="16">{escape(_shortened(title, 58))}</text>']
    for value in _decades(low, high):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text class="muted" x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{escape(unit(value))}</text>"
        )
    for size in sizes:
        parts.append(
            f'<text class="muted" x="{x(size):.1f}" y="{bottom + 18}" text-anchor="middle">{size:g}</text>'
        )
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="muted" x="{(left + right) / 2:.0f}" y="{bottom + 35}" text-anchor="middle">'
        f"{escape(axis)}</text>"
    )
    ends = []
    for number, line in enumerate(lines):
        color = f"var(--c{number % SERIES})"
        placed = sorted(line.points)
        path = " ".join(f"{x(size):.1f},{y(value):.1f}" for size, value, _, _ in placed)
        band = [f"{x(size):.1f},{y(bound):.1f}" for size, _, bound, _ in placed]
        band += [f"{x(size):.1f},{y(bound):.1f}" for size, _, _, bound in reversed(placed)]
        parts.append(f'<polygon class="band" style="fill: {color}" points="{" ".join(band)}"/>')
        parts.append(f'<polyline class="line" style="stroke: {color}" points="{path}"/>')
        for size, value, _, _ in placed:
            tip = escape(f"{line.name}, {axis} {size:g}: {unit(value)}")
            parts.append(
                f'<circle style="fill: {color}" cx="{x(size):.1f}" cy="{y(value):.1f}" r="3.5">'
                f"<title>{tip}</title></circle>"
            )
        ends.append((y(placed[-1][1]), x(placed[-1][0]), line.name, color))
    parts += _end_labels(ends)
    return _svg(CURVE_WIDTH, CURVE_HEIGHT, parts)


def _end_labels(ends: list[tuple[float, float, str, str]]) -> list[str]:
    """Name each curve at its last point, names at least a line apart."""
    parts, above = [], -math.inf
    for y, x, name, color in sorted(ends):
        y = max(y, above + 14)
        above = y
        parts.append(
            f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" style="fill: {color}"><title>{escape(name)}</title>'
            f"{escape(_shortened(name, 16))}</text>"
        )
    return parts


def _log_place(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return a function from a value to its place between `start` and `end`."""
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span


def _decades(low: float, high: float) -> list[float]:
    """Return round values between low and high: powers of ten, and multiples of them where those are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) >= 3:
            return inside
    return inside or [low, high]


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _svg(width: float, height: float, parts: list[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="img">{"".join(parts)}</svg>'
    )
