"""Writes measured figures into the pages: between `<!-- figures: NAME -->` and `<!-- end -->`.

    python tools/figures.py           rewrite README.md and docs/*.md
    python tools/figures.py --check   say which pages are out of date, exit 1 if any is

NAME `cpu` is the benchmark results of that device (benchmarks/results/cpu.json), `cpu-headlines` a few of
them, `gpu` those of every other device, `tiny-python` the evaluation of the embedded model (its
evaluation.json). Nobody types a figure into a page.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from dllm_train.recipes.tiny_python_export import ATTENTION, percent, table, threshold_table  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
SECTION = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """The page with every section filled from the results."""
    return SECTION.sub(lambda match: match[1] + SECTIONS[match[2]]() + match[3], page)


HEADLINES = {
    ("attention", "block_attention_bd3lm[1024]"): "attention, BD3LM training mask, 1024 tokens",
    ("attention", "block_attention_bd3lm_with_gradients[1024]"): "the same with gradients",
    ("cached_attention", "cached_block_attention[4096]"): "a block of 32 over 4096 cached tokens",
    ("token_stats", "token_stats_greedy[float32]"): "token and confidence of 32 rows, greedy",
    ("token_stats", "token_stats_sampled"): "the same at temperature 1",
    ("linear_token_stats", "linear_token_stats[32]"): "the same from hidden states, greedy",
    ("loss", "linear_loss"): "projected loss with gradients, half masked",
    ("sampling", "sampling_bidirectional[none]"): "128 tokens from a 58M-parameter model, exact",
    ("sampling", "sampling_bidirectional[none-compiled]"): "the same compiled",
    ("sampling", "sampling_bidirectional[dual]"): "the same with the dual cache, approximate",
    ("sampling", "sampling_bidirectional[dual-compiled]"): "the same compiled",
    ("sampling", "sampling_block_causal"): "the same block-causal, exact",
    ("sampling", "sampling_tiny_python[eager]"): "384 tokens of code from the embedded model, threshold 0.9",
    ("sampling", "sampling_tiny_python[compiled]"): "the same compiled",
}


def cpu_headlines() -> str:
    """The comparisons of HEADLINES, without machine: the page that is linked names it."""
    results = json.loads((RESULTS / "cpu.json").read_text())
    lines = ["| on a CPU | ours | how many times as fast |", "|---|---|---|"]
    for (suite, case), what in HEADLINES.items():
        figures = results[suite]["cases"][case]
        times = (f"{other['speedup']['median']:.1f}× {name}" for name, other in figures["baselines"].items())
        lines.append(f"| {what} | {_duration(figures['ours_seconds']['median'])} | {', '.join(times)} |")
    return "\n".join([*lines, ""])


def cpu_table() -> str:
    return results_table(RESULTS / "cpu.json")


def gpu_tables() -> str:
    """A table for each GPU that was measured."""
    files = sorted(path for path in RESULTS.glob("*.json") if path.stem != "cpu")
    if not files:
        return "No GPU has been measured yet.\n"
    return "\n".join(f"### {_device(path)}\n\n{results_table(path)}" for path in files)


def _device(path: Path) -> str:
    return next(iter(json.loads(path.read_text()).values()))["machine"]["device"]


def results_table(path: Path) -> str:
    """One line for each comparison: our median time, and how many times as long each alternative takes."""
    results = json.loads(path.read_text())
    lines = ["| suite | case | ours | rate | alternatives take | memory |", "|---|---|---|---|---|---|"]
    machines = {}
    for suite, measured in results.items():
        machines.setdefault(f"{_machine(measured['machine'])}, {measured['date']}", []).append(suite)
        for case, figures in measured["cases"].items():
            others = figures["baselines"]
            times = (f"{other['speedup']['median']:.2f}× as long: {name}" for name, other in others.items())
            memory = (
                f"{figures['peak_bytes'] / other['peak_bytes']:.0%} of {name}"
                for name, other in others.items()
                if "peak_bytes" in figures and other.get("peak_bytes")
            )
            cells = (
                suite,
                case,
                _duration(figures["ours_seconds"]["median"]),
                _rate(figures, measured["peaks"]),
                ", ".join(times),
                ", ".join(memory),
            )
            lines.append(f"| {' | '.join(cells)} |")
    where = (f"{', '.join(suites)}: {machine}." for machine, suites in machines.items())
    return "\n".join([*lines, "", "Medians. Measured on:", "", *(f"- {line}" for line in where), ""])


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _rate(figures: dict, peaks: dict) -> str:
    """Useful operations or bytes per second, and their share of the machine's peak."""
    for name, unit in (("flops", "FLOP/s"), ("bytes", "B/s")):
        if rate := figures.get(f"{name}_per_second"):
            scale, prefix = (1e12, "T") if rate >= 1e12 else (1e9, "G")
            share = f" ({rate / peaks[name]:.0%})" if name in peaks else ""
            return f"{rate / scale:.3g} {prefix}{unit}{share}"
    return ""


def tiny_python() -> str:
    """The embedded model's held-out figures, each with its kind of attention."""
    evaluation = json.loads((ROOT / "dllm_kernels/assets/tiny-python/evaluation.json").read_text())
    bound, where = evaluation["bound"], evaluation["environment"]
    additions, infill = evaluation["additions"], evaluation["infill"]
    exact = {kind: percent(infill[kind]["one_per_step"]["exact"]) for kind in ATTENTION}
    return f"""\
`tiny-python` has {evaluation["model"]["parameters"] / 1e6:.1f}M parameters. On held-out data:

- {bound["bd3lm_bits_per_byte"]:.2f} bits per byte at most (block_causal); `gzip -9` needs \
{bound["gzip_bits_per_byte"]:.2f}
- {percent(additions["one_per_step"]["exact"])} of {additions["pairs"]} additions of two-digit numbers exact \
at one token per step (block_causal)
- {exact["bidirectional"]} of {infill["lines"]} infilled lines exact (bidirectional), \
{exact["block_causal"]} without sight of what follows the block (block_causal)

Tokens per forward by the threshold of the rule:

{threshold_table(evaluation)}

Measured on {where["machine"]}, {where["cores"]} cores, torch {where["versions"]["torch"]}, commit \
{where["commit"]}. More in the [model card](dllm_kernels/assets/tiny-python/README.md).
"""


def threshold_figures() -> str:
    """Speed and accuracy of the embedded model by the threshold of its rule."""
    evaluation = json.loads((ROOT / "dllm_kernels/assets/tiny-python/evaluation.json").read_text())
    measured = json.loads((RESULTS / "cpu.json").read_text())["sampling"]
    tokens = "tokens per forward"
    columns = ("threshold", "additions: exact", tokens, "speed", f"code: {tokens}", "speed")
    rows = [
        [
            "one token per step",
            percent(evaluation["additions"]["one_per_step"]["exact"]),
            f"{evaluation['additions']['one_per_step']['tokens_per_forward']:.2f}",
            "1",
            f"{evaluation['completion']['one_per_step']['tokens_per_forward']:.2f}",
            "1",
        ]
    ]
    for threshold in ("0.9", "0.7", "0.5"):
        cells = [threshold, percent(evaluation["additions"][threshold]["exact"])]
        for task, figures in (("additions-16", "additions"), ("code-128", "completion")):
            case = measured["cases"][f"sampling_threshold[{threshold}-{task}]"]["baselines"]
            cells.append(f"{evaluation[figures][threshold]['tokens_per_forward']:.2f}")
            cells.append(f"{case['one token per step']['speedup']['median']:.2f}×")
        rows.append(cells)
    return f"{table(columns, rows)}\n\nSpeed measured on {_machine(measured['machine'])}.\n"


def _machine(machine: dict) -> str:
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"torch {machine['torch']}, commit {machine['commit']}"
    )


SECTIONS = {
    "cpu": cpu_table,
    "cpu-headlines": cpu_headlines,
    "gpu": gpu_tables,
    "thresholds": threshold_figures,
    "tiny-python": tiny_python,
}


def main(check: bool) -> int:
    stale = []
    for page in PAGES:
        before = page.read_text()
        after = render(before)
        if after != before:
            stale.append(page.relative_to(ROOT))
            if not check:
                page.write_text(after)
    for page in stale:
        print(f"{page} {'is out of date: run python tools/figures.py' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
