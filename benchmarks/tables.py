"""Results as text: the table on the console, and the Markdown that pages quote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.results import Row, in_order

RATES = (("flops", "FLOP/s"), ("bytes", "B/s"))
COLUMNS = ("case", "ours", "rate", "speedup over", "memory", "run")


def console(rows: list[Row], peaks: dict[str, float]) -> list[str]:
    """Return lines: title, time, rates with their share of the peak; below, baselines with speedups."""
    summaries = [row.summary() for row in rows]
    width = max(
        len(name)
        for summary in summaries
        for name in (summary["title"], *(f"vs {other}" for other in summary["baselines"]))
    )
    lines = []
    for summary in summaries:
        line = f"{summary['title']:{width}}  {_time(summary['ours_seconds'])}"
        for name, unit in RATES:
            if rate := summary.get(f"{name}_per_second"):
                line += f"  {rate / 1e9:.4g} G{unit}"
                line += f" ({rate / peaks[name]:.0%} of peak)" if name in peaks else ""
        lines.append(line + _tokens_and_memory(summary))
        for name, other in summary["baselines"].items():
            speedup = other["speedup"]
            spread = f"{speedup['median']:.2f}x [{speedup['p20']:.2f}, {speedup['p80']:.2f}]"
            lines.append(
                f"{'vs ' + name:>{width}}  {_time(other['seconds'])}  {spread}" + _tokens_and_memory(other)
            )
    return lines


def _time(spread: dict[str, float]) -> str:
    low, middle, high = (spread[name] * 1e6 for name in ("p20", "median", "p80"))
    scale, unit = (1e6, "s ") if middle >= 1e6 else (1e3, "ms") if middle >= 1e3 else (1, "µs")
    return f"{middle / scale:9.2f} {unit} [{low / scale:.2f}, {high / scale:.2f}]"


def _tokens_and_memory(figures: dict) -> str:
    tokens = f"  {figures['tokens_per_second']:.4g} tokens/s" if "tokens_per_second" in figures else ""
    return tokens + (f"  peak {figures['peak_bytes'] / 1e6:.1f} MB" if "peak_bytes" in figures else "")


def markdown(results: dict) -> str:
    """Return a table for every suite of a device's file, and the runs that measured the rows."""
    parts = []
    for suite, cases in sorted(results["suites"].items()):
        rows = [_cells(figures, results["runs"]) for _, figures in in_order(cases)]
        parts.append(f"**{suite}**\n\n{grid(COLUMNS, rows)}\n")
    parts.append(f"Medians. Runs:\n\n{runs(results)}")
    return "\n".join(parts)


def grid(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; a | in a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def runs(results: dict) -> str:
    """Return a line for the numbers of all runs of one machine, commit and date."""
    return "".join(f"- {numbers}: {text}.\n" for text, numbers in numbered_runs(results).items())


def numbered_runs(results: dict) -> dict[str, str]:
    """Return machine, commit and date -> the numbers of its runs, "1, 2"."""
    numbers: dict[str, list[str]] = {}
    for number, run in sorted(results["runs"].items(), key=lambda item: int(item[0])):
        numbers.setdefault(f"{machine(run['machine'])}, {run['date']}", []).append(number)
    return {text: ", ".join(several) for text, several in numbers.items()}


def machine(about: dict) -> str:
    return (
        f"{about['cpu']}, {about['threads']} threads, {about['instruction_set']}, "
        f"torch {about['torch']}, commit {about['commit']}"
    )


def _cells(figures: dict, runs: dict[str, dict]) -> tuple[str, ...]:
    others = figures["baselines"]
    return (
        figures["title"],
        duration(figures["ours_seconds"]["median"]),
        rate(figures, runs[figures["run"]]["peaks"]),
        "; ".join(f"{name} {other['speedup']['median']:.2f}×" for name, other in others.items()),
        "; ".join(
            f"{percent(figures['peak_bytes'] / other['peak_bytes'])} of {name}"
            for name, other in others.items()
            if "peak_bytes" in figures and other.get("peak_bytes")
        ),
        figures["run"],
    )


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


def memory(count: int) -> str:
    """Write a number of bytes."""
    scale, unit = (1e9, "GB") if count >= 1e9 else (1e6, "MB") if count >= 1e6 else (1e3, "kB")
    return f"{count / scale:.3g} {unit}"


def rate(figures: dict, peaks: dict[str, float]) -> str:
    """Return useful operations or bytes per second with their share of the peak, or tokens per second."""
    for name, unit in RATES:
        if amount := figures.get(f"{name}_per_second"):
            scale, prefix = (1e12, "T") if amount >= 1e12 else (1e9, "G")
            share = f" ({amount / peaks[name]:.0%})" if name in peaks else ""
            return f"{amount / scale:.3g} {prefix}{unit}{share}"
    return f"{figures['tokens_per_second']:.3g} tokens/s" if "tokens_per_second" in figures else ""
