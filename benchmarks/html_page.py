"""The report as one HTML page: no script, no font and no picture from anywhere else."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from benchmarks import charts
from benchmarks.charts import Bar, Curve
from benchmarks.results import in_order
from benchmarks.tables import RATES, duration, memory, numbered_runs, percent, rate

PEAKS = {"flops": "torch's square matrix product", "bytes": "a copy"}
PAGE_STYLE = """
body { margin: 2rem auto; max-width: 900px; padding: 0 1rem; background: var(--surface); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 3rem 0 .2rem; } h2 { margin-top: 2.4rem; font-size: 1.25rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, li { color: var(--muted); } p { max-width: 46rem; } li b { color: var(--ink); }
.scroll { overflow-x: auto; } .curves { display: flex; flex-wrap: wrap; gap: 1rem; }
table { border-collapse: collapse; font-size: 13px; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 600; } td { overflow-wrap: anywhere; }
td.number { white-space: nowrap; }
"""


def page(devices: Iterable[dict]) -> str:
    """Return the report on `devices`, each the content of a device's file."""
    body = "".join(_device(results) for results in devices)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dllm_kernels benchmarks</title><style>{charts.STYLE}{PAGE_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _device(results: dict) -> str:
    cases = {suite: [figures for _, figures in in_order(cases)] for suite, cases in results["suites"].items()}
    everything = [figures for figures_of_suite in cases.values() for figures in figures_of_suite]
    return "".join(
        (
            f"<h1>Benchmarks on {escape(results['device'])}</h1>",
            "<p>Times are medians; thin lines and bands reach from the 20th to the 80th percentile. Ours and "
            "the alternatives take turns in one run, and a speedup is the median of the rounds' ratios.</p>",
            _runs(results),
            _speedups(cases),
            _scaling(results["suites"], "length", "Scaling with length"),
            _scaling(results["suites"], "batch", "Scaling with batch size"),
            _shares_of_peak(everything, results["runs"]),
            _memory(everything),
            _all_figures(cases, results["runs"]),
        )
    )


def _runs(results: dict) -> str:
    lines = "".join(
        f"<li><b>Run {escape(numbers)}</b>: {escape(text)}</li>"
        for text, numbers in numbered_runs(results).items()
    )
    return f"<ul>{lines}</ul>"


def _speedups(suites: dict[str, list[dict]]) -> str:
    parts = []
    for suite, cases in sorted(suites.items()):
        groups = [(figures["title"], _speedup_bars(figures)) for figures in cases if figures["baselines"]]
        if groups:
            parts.append(f"<h3>{escape(suite)}</h3>{_scrolling(charts.speedup_bars(groups))}")
    if not parts:
        return ""
    return (
        "<h2>Speedups</h2><p>How many times as long each alternative takes. Below 1× it is faster than "
        f"ours. The axis is logarithmic.</p>{''.join(parts)}"
    )


def _speedup_bars(figures: dict) -> list[Bar]:
    ours = duration(figures["ours_seconds"]["median"])
    return [
        Bar(
            name,
            other["speedup"]["median"],
            f"{_times(other['speedup']['median'])}  ({duration(other['seconds']['median'])} / {ours})",
            (other["speedup"]["p20"], other["speedup"]["p80"]),
        )
        for name, other in figures["baselines"].items()
    ]


def _times(speedup: float) -> str:
    return f"{speedup:.2f}×" if speedup < 10 else f"{speedup:.1f}×" if speedup < 100 else f"{speedup:.0f}×"


def _scaling(suites: dict[str, dict], axis: str, heading: str) -> str:
    drawn = scaling_charts(suites, axis)
    return f'<h2>{heading}</h2><div class="curves">{"".join(drawn)}</div>' if drawn else ""


def scaling_charts(suites: dict[str, dict], axis: str) -> list[str]:
    """Return a chart of time for every family of cases measured at several places of `axis`."""
    families: dict[tuple[str, str], list[dict]] = {}
    for suite, cases in sorted(suites.items()):
        for case, figures in cases.items():
            if figures.get("axis") == axis:
                families.setdefault((suite, case.split("[")[0]), []).append(figures)
    return [
        charts.curves(family.replace("_", " "), axis, _curves(cases), duration)
        for (_, family), cases in families.items()
        if len({figures["size"] for figures in cases}) > 1
    ]


def _curves(cases: list[dict]) -> list[Curve]:
    names = dict.fromkeys(name for figures in cases for name in figures["baselines"])
    return [
        Curve("ours", [_point(figures, figures["ours_seconds"]) for figures in cases]),
        *(
            Curve(
                name,
                [
                    _point(figures, figures["baselines"][name]["seconds"])
                    for figures in cases
                    if name in figures["baselines"]
                ],
            )
            for name in names
        ),
    ]


def _point(figures: dict, seconds: dict) -> tuple[float, float, float, float]:
    return figures["size"], seconds["median"], seconds["p20"], seconds["p80"]


def _shares_of_peak(cases: list[dict], runs: dict[str, dict]) -> str:
    parts = []
    for name, _ in RATES:
        groups = []
        for figures in cases:
            peak, amount = runs[figures["run"]]["peaks"].get(name), figures.get(f"{name}_per_second")
            if peak and amount:
                share = amount / peak
                shown = rate({f"{name}_per_second": amount}, {})
                groups.append((None, [Bar(figures["title"], share, f"{share:.0%}  ({shown})")]))
        if groups:
            parts.append(f"<h3>Of {PEAKS[name]}</h3>{_scrolling(charts.share_bars(groups))}")
    if not parts:
        return ""
    return (
        "<h2>Share of peak</h2><p>Useful work per second as a share of what the same machine reached in the "
        "same run. Only visible pairs and bytes that must move count. A case that fits in a cache can exceed "
        f"the speed of a copy.</p>{''.join(parts)}"
    )


def _memory(cases: list[dict]) -> str:
    groups = []
    for figures in cases:
        bars = []
        for name, other in figures["baselines"].items():
            if figures.get("peak_bytes") is not None and other.get("peak_bytes"):
                share = figures["peak_bytes"] / other["peak_bytes"]
                shown = f"{percent(share)}  ({memory(figures['peak_bytes'])} / {memory(other['peak_bytes'])})"
                bars.append(Bar(f"of {name}", share, shown))
        if bars:
            groups.append((figures["title"], bars))
    if not groups:
        return ""
    return (
        "<h2>Memory</h2><p>Peak memory that one call adds, ours as a share of the alternative's.</p>"
        f"{_scrolling(charts.share_bars(groups))}"
    )


def _all_figures(suites: dict[str, list[dict]], runs: dict[str, dict]) -> str:
    parts = ["<h2>All figures</h2>"]
    for suite, cases in sorted(suites.items()):
        rows = "".join(_row(figures, runs) for figures in cases)
        parts.append(
            f'<h3>{escape(suite)}</h3><div class="scroll"><table><tr><th>case</th><th>ours</th><th>rate</th>'
            f"<th>alternatives</th><th>rounds</th><th>run</th></tr>{rows}</table></div>"
        )
    return "".join(parts)


def _row(figures: dict, runs: dict[str, dict]) -> str:
    others = "<br>".join(
        escape(f"{name}: {_spread(other['seconds'])}, {_times(other['speedup']['median'])}{_tokens(other)}")
        for name, other in figures["baselines"].items()
    )
    shown = rate(figures, runs[figures["run"]]["peaks"])
    return (
        f'<tr><td>{escape(figures["title"])}</td><td class="number">{_spread(figures["ours_seconds"])}</td>'
        f'<td class="number">{escape(shown)}</td><td>{others}</td><td>{figures["rounds"]}</td>'
        f"<td>{escape(figures['run'])}</td></tr>"
    )


def _tokens(figures: dict) -> str:
    return f", {figures['tokens_per_second']:.3g} tokens/s" if "tokens_per_second" in figures else ""


def _spread(seconds: dict) -> str:
    low, high = (duration(seconds[end]) for end in ("p20", "p80"))
    return f"{duration(seconds['median'])} [{low}, {high}]"


def _scrolling(chart: str) -> str:
    return f'<div class="scroll">{chart}</div>'
