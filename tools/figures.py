"""Write measured figures into the pages: between `<!-- figures: NAME -->` and `<!-- end -->`.

    python tools/figures.py           rewrite README.md, docs/*.md and the plots of benchmarks/results
    python tools/figures.py --check   say which of them are out of date, exit 1 if any is

NAME `cpu` is the benchmark results of that device (benchmarks/results/cpu.json), `headline`,
`first-page` and `training` a few of them, `gpu` those of every other device, `thresholds` and
`tiny-python` the evaluation of the embedded model (its evaluation.json), `smollm2` that of the recipe
(docs/smollm2.json), `step-*` and `weights-accuracy` the parts of a step (docs/performance.json). Nobody
types a figure into a page.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import report, results, step_tables  # noqa: E402
from benchmarks.tables import duration, grid, machine, markdown  # noqa: E402
from dllm_train.recipes import smollm2  # noqa: E402
from dllm_train.recipes.tiny_python.export import percent  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
OPENING = "<!-- figures:"
SECTION = re.compile(OPENING + r" (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def render(page: str) -> str:
    """Return the page with every section filled from the results.

    Raises ValueError for a section that is not known, or does not end before the next one.
    """
    sections = list(SECTION.finditer(page))
    if len(sections) != page.count(OPENING):
        raise ValueError(f"{page.count(OPENING)} times {OPENING}, but {len(sections)} sections with an end")
    for section in sections:
        if section[1] not in SECTIONS:
            raise ValueError(f"figures: {section[1]} is not known; known: {', '.join(SECTIONS)}")
    return SECTION.sub(
        lambda section: f"{OPENING} {section[1]} -->\n{SECTIONS[section[1]]()}<!-- end -->", page
    )


LLADA = "LLaDA's loop"


def on_cpu(suite: str, names: Iterable[str] | None = None) -> tuple[dict[str, dict], dict]:
    """Return cases of a suite, and the CPU's file with the runs of these cases alone."""
    content = results.read(RESULTS / "cpu.json")
    cases = content["suites"][suite]
    cases = {name: cases[name] for name in (cases if names is None else names)}
    used = {figures["run"] for figures in cases.values()}
    return cases, content | {"runs": {name: run for name, run in content["runs"].items() if name in used}}


def measured_on(content: dict) -> str:
    """Say on which machines and commits the runs of `content` were measured."""
    machines = dict.fromkeys(machine(run["machine"]) for run in content["runs"].values())
    return f"measured on {'; '.join(machines)}."


def headline() -> str:
    """Describe the library in one sentence with its speedups."""
    names = [f"sampling_bidirectional[{case}]" for case in ("none", "dual-compiled")]
    cases, content = on_cpu("sampling", names)
    exact, fastest = (cases[name]["baselines"][LLADA]["speedup"]["median"] for name in names)
    threads = {run["machine"]["threads"] for run in content["runs"].values()}
    return (
        "Fast sampling for diffusion language models (LLaDA, Dream, MDLM, BD3LM and related models):\n"
        f"on {' or '.join(map(str, sorted(threads)))} CPU threads, `dk.sample()` gives the tokens of LLaDA's "
        f"loop {exact:.1f}× as fast,\nand is {fastest:.1f}× as fast with an approximate cache and "
        "`torch.compile`.\n"
    )


NOT_MEASURED = "not measured"
WHAT_OTHERS_DO = (
    ("unequal prompts in one batch", "yes", "padded by the caller", "one prompt at a time", "padded"),
    ("runs without a GPU", "kernels for AVX2 and AVX-512", "by PyTorch", "by PyTorch", "by PyTorch"),
    ("stock transformers models", "yes", "those that see both ways", "own classes", "own classes, or BERT"),
)


PEERS_SHOWN = ("peer[dllm, MDLMSampler]", "peer[fast-dllm, dual cache]")


def first_page() -> str:
    """Compare times for the same tokens, as far as they were measured, and what each of the systems does."""
    names = {cache: f"sampling_bidirectional[{cache}]" for cache in ("none", "dual")}
    cases, content = on_cpu("sampling", names.values())
    peers = results.read(RESULTS / "cpu.json")["suites"].get("peers", {})

    def peer(case: str) -> str:
        if case not in peers:
            return NOT_MEASURED
        (theirs,) = peers[case]["baselines"].values()
        return f"{theirs['speedup']['median']:.1f}× our time"

    def ours(cache: str) -> str:
        return duration(cases[names[cache]]["ours_seconds"]["median"])

    loop = duration(cases[names["none"]]["baselines"][LLADA]["seconds"]["median"])
    rows = (
        ("128 identical tokens", ours("none"), loop, NOT_MEASURED, peer(PEERS_SHOWN[0])),
        (
            "128 tokens, approximate cache",
            ours("dual"),
            "has none",
            peer(PEERS_SHOWN[1]),
            NOT_MEASURED,
        ),
        *WHAT_OTHERS_DO,
    )
    table = grid(("", "dllm_kernels", LLADA, "Fast-dLLM", "dLLM"), rows)
    text = f"{table}\n\nTimes: medians of a 60M model, {measured_on(content)}\n"
    if found := [case for case in PEERS_SHOWN if case in peers]:
        _, beside = on_cpu("peers", found)
        text += f"Ratios: their checkouts beside ours, with equal tokens, {measured_on(beside)}\n"
    return text


def cpu_table() -> str:
    return markdown(results.read(RESULTS / "cpu.json"))


def gpu_tables() -> str:
    """A table for each GPU that was measured."""
    files = sorted(path for path in RESULTS.glob("*.json") if path.stem != "cpu")
    if not files:
        return "No GPU has been measured yet.\n"
    contents = map(results.read, files)
    return "\n".join(f"### {content['device']}\n\n{markdown(content)}" for content in contents)


def tiny_python() -> str:
    """Describe the embedded model's best figures, and link the rest."""
    evaluation = json.loads((ROOT / "dllm_kernels/assets/tiny-python/evaluation.json").read_text())
    additions = evaluation["additions"]
    parameters = f"{evaluation['model']['parameters'] / 1e6:.1f}M"
    exact, tokens = (additions["0.9"][name] for name in ("exact", "tokens_per_forward"))
    return (
        f"`tiny-python` ({parameters} parameters) comes with the package. It completes {percent(exact)} of "
        f"{additions['pairs']} held-out additions\nexactly, with {tokens:.2f} tokens per forward at "
        "threshold 0.9. Code is harder for it: its\n"
        "[model card](dllm_kernels/assets/tiny-python/README.md) has every figure.\n"
    )


THRESHOLDS = ("0.9", "0.7", "0.5")
TASKS = {"additions-16": "additions", "code-128": "completion"}  # of the benchmark -> of the evaluation


def threshold_figures() -> str:
    """Speed and accuracy of the embedded model by the threshold of its rule."""
    evaluation = json.loads((ROOT / "dllm_kernels/assets/tiny-python/evaluation.json").read_text())
    cases, content = on_cpu(
        "sampling",
        [f"sampling_threshold[{threshold}-{task}]" for threshold in THRESHOLDS for task in TASKS],
    )
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
    for threshold in THRESHOLDS:
        cells = [threshold, percent(evaluation["additions"][threshold]["exact"])]
        for task, figures in TASKS.items():
            case = cases[f"sampling_threshold[{threshold}-{task}]"]["baselines"]
            cells.append(f"{evaluation[figures][threshold]['tokens_per_forward']:.2f}")
            cells.append(f"{case['one token per step']['speedup']['median']:.2f}×")
        rows.append(cells)
    return f"{grid(columns, rows)}\n\nSpeed {measured_on(content)}\n"


TRAINING = {
    "mdlm-512-2": "MDLM, 2 rows of 512",
    "bd3lm-512-2": "BD3LM, 2 rows of 512",
    "bd3lm-2048-1": "BD3LM, 1 row of 2048",
    "bd3lm-4096-1": "BD3LM, 1 row of 4096",
}


TRAINING_MODES = {
    "eager": "",
    "fused": ", fused layers",
    "selective": ", selective checkpointing",
    "compiled": ", `torch.compile`",
    "fused-compiled": ", fused layers, `torch.compile`",
}


def training_table() -> str:
    """Whole trainers, and the memory of a step, against the plain implementation."""
    cases, content = on_cpu("training")
    rows = []
    for case, what in TRAINING.items():
        for mode, name in TRAINING_MODES.items():
            run, step = (cases.get(f"training_{kind}[{case}-{mode}]") for kind in ("run", "step"))
            if run is None or step is None:
                continue
            plain = step["baselines"]["dense mask, all logits"]
            rows.append(
                (
                    what + name,
                    duration(step["ours_seconds"]["median"]),
                    f"{plain['speedup']['median']:.2f}×",
                    f"{run['baselines']['plain trainer']['speedup']['median']:.2f}×",
                    f"{step['peak_bytes'] / plain['peak_bytes']:.0%}",
                )
            )
    columns = ("60M model, float32, CPU", "our step", "speedup of the step", "of the whole trainer", "memory")
    note = "Memory: beyond weights, gradients and optimizer state, as a share of the plain implementation's."
    return f"{grid(columns, rows)}\n\n{note}\nMedians, {measured_on(content)}\n"


def smollm2_run() -> str:
    """Describe the result of the SmolLM2 recipe."""
    return smollm2.page_section(json.loads((ROOT / "docs/smollm2.json").read_text()))


PERFORMANCE = ROOT / "docs/performance.json"
THREADS_PLOT = ROOT / "docs/images/threads.svg"


def of_step(table: Callable[[dict], str]) -> Callable[[], str]:
    """Return a section that shows docs/performance.json as `table`."""
    return lambda: table(json.loads(PERFORMANCE.read_text()))


SECTIONS = {
    "cpu": cpu_table,
    "first-page": first_page,
    "gpu": gpu_tables,
    "headline": headline,
    "smollm2": smollm2_run,
    "step-avx2": of_step(partial(step_tables.steps, section="avx2")),
    "step-limits": of_step(step_tables.limits),
    "step-parts": of_step(step_tables.steps),
    "step-threads": of_step(step_tables.threads),
    "thresholds": threshold_figures,
    "tiny-python": tiny_python,
    "training": training_table,
    "weights-accuracy": of_step(step_tables.accuracy),
}


def plots() -> dict[Path, str]:
    """Return the scaling plot of every device, and that of a step's threads, by its path."""
    drawn = {
        path.with_suffix(".svg"): report.plot(results.read(path)) for path in sorted(RESULTS.glob("*.json"))
    }
    return drawn | {THREADS_PLOT: of_step(step_tables.threads_plot)()}


def main(check: bool) -> int:
    wanted = {page: render(page.read_text()) for page in PAGES} | plots()
    stale = [path for path, text in wanted.items() if text != (path.read_text() if path.exists() else "")]
    for path in stale:
        if not check:
            path.write_text(wanted[path])
        print(f"{path.relative_to(ROOT)} {'is out of date: run make figures' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
