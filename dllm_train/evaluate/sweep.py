"""Sweep threshold x cache x block size over a task: accuracy beside speed, as a table and a plot.

    sweep({"pretrained": "tiny-python"}, "python_arithmetic", thresholds=[0.5, 0.7, 0.9, None],
          caches=["block", "none"], block_sizes=[16, 32], output="sweep")

Requests run one at a time, so that tokens per second are those of one request. `output` holds a file for each
finished cell; the same call continues after an interruption. A folder of other weights, or of another task,
is refused.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lm_eval

from dllm_kernels.sampling.plan import make_plan
from dllm_train.evaluate import record, task_manager
from dllm_train.evaluate.lm import DiffusionLM
from dllm_train.evaluate.metrics import area_under
from dllm_train.evaluate.options import LOADING

log = logging.getLogger("lm_eval.dllm")

SPEEDS = {"tokens_per_second": "tokens per second", "tokens_per_forward": "tokens per forward"}


@dataclass(frozen=True)
class Cell:
    """A combination of options and its results.

    threshold: None is one token per step. exact: whether its cache approximates nothing. accuracy: the score
    of the task. tokens_per_second: of one request, the median; tokens_per_forward: of all answers.
    """

    threshold: float | None
    cache: str
    block_size: int
    exact: bool
    accuracy: float
    tokens_per_second: float
    tokens_per_forward: float


def sweep(
    model_args: Mapping[str, object],
    task: str,
    *,
    thresholds: Sequence[float | None],
    caches: Sequence[str],
    block_sizes: Sequence[int],
    output: Path | str,
    metric: str | None = None,
    limit: int | None = None,
) -> list[Cell]:
    """Return a cell for each combination, and write table.md, results.json and plot.svg into `output`.

    model_args: those of the lm-eval model `dllm`, "pretrained" among them; they hold in every cell. task: one
    that generates. metric: which of its scores is the accuracy; default: its first. limit: documents.
    Raises ValueError for options that conflict with each other or the model, before any cell runs, for
    unknown tasks and metrics, and for a folder that holds a sweep of something else.
    """
    combinations = _combinations(thresholds, caches, block_sizes)
    given = dict(model_args)
    swept = {"threshold", "cache", "block_size", "batch_size"} & given.keys()
    if swept:
        raise ValueError(f"model_args has {min(swept)}, which the sweep sets itself")
    first = DiffusionLM(**given, batch_size=1)
    shared = {
        name: value for name, value in given.items() if name not in ("pretrained", "tokenizer", *LOADING)
    }
    tasks = _tasks(task)
    for options in combinations:
        make_plan(first.model, first.tokenizer, None, {**first.options.sampling, **options})
    folder = Path(output)
    _claim(folder, first, task, given, metric, limit)
    cells = []
    for options in combinations:
        kept = folder / "cells" / f"{_name(options)}.json"
        if not kept.exists():
            model = DiffusionLM(first.model, tokenizer=first.tokenizer, batch_size=1, **shared, **options)
            record.write(kept, asdict(_measured(model, tasks, task, metric, limit, options)))
        cells.append(Cell(**json.loads(kept.read_text())))
        log.info("%s: accuracy %.3f", _name(options), cells[-1].accuracy)
    _write(folder, task, cells)
    return cells


def _combinations(thresholds, caches, block_sizes) -> list[dict]:
    named = {"thresholds": thresholds, "caches": caches, "block_sizes": block_sizes}
    for name, values in named.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} is {list(values)}; expected at least one value, each once")
    return [
        {"threshold": threshold, "cache": cache, "block_size": size}
        for cache, size, threshold in itertools.product(caches, block_sizes, thresholds)
    ]


def _name(options: Mapping[str, object]) -> str:
    return "cache={cache},block_size={block_size},threshold={threshold}".format(**options)


def _claim(folder: Path, model: DiffusionLM, task: str, given: dict, metric: str | None, limit) -> None:
    """Record what the folder's cells measure; refuse a folder whose cells measure something else."""
    of = {
        "checkpoint_sha256": model.checkpoint_sha256,
        "task": task,
        "model_args": {name: str(value) for name, value in sorted(given.items()) if name != "pretrained"},
        "metric": metric,
        "limit": limit,
    }
    path = folder / "sweep.json"
    if path.exists():
        found = json.loads(path.read_text())
        for name, value in of.items():
            if found.get(name) != value:
                raise ValueError(
                    f"output is {folder}, which holds a sweep with {name} {found.get(name)}; this one has "
                    f"{value}. Give another folder"
                )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output is {folder}, which holds files but no sweep; give another folder")
    else:
        (folder / "cells").mkdir(parents=True)
        record.write(path, of)


def _tasks(task: str):
    """Return lm-eval's TaskManager that knows the task; lm-eval's own tasks take long to index."""
    ours = task_manager(include_defaults=False)
    if task in ours.all_tasks:
        return ours
    every = task_manager()
    if task not in every.all_tasks:
        raise ValueError(f"task is {task!r}, which lm-eval does not know; dllm eval ls tasks lists them")
    return every


def _measured(
    model: DiffusionLM, tasks, task: str, metric: str | None, limit: int | None, options: dict
) -> Cell:
    """Run the task with one combination."""
    run = lm_eval.simple_evaluate(
        model=model, tasks=[task], limit=limit, bootstrap_iters=0, task_manager=tasks,
        apply_chat_template=model.instruct and model.tokenizer.chat_template is not None,
    )  # fmt: skip
    scores = {
        name.partition(",")[0]: float(value)
        for name, value in run["results"][task].items()
        if "," in name and "_stderr" not in name and not name.endswith(",dllm")
    }
    metric = metric or next(iter(scores))
    if metric not in scores:
        raise ValueError(f"metric is {metric!r}; {task} has {', '.join(scores)}")
    measures = model.measures.of(task)
    if "tokens_per_second_alone" not in measures:
        raise ValueError(f"task {task} generates nothing, so it has no speed; give one that generates")
    exact = model.config.cache not in ("prefix", "dual")
    return Cell(
        **options,
        exact=exact,
        accuracy=scores[metric],
        tokens_per_second=measures["tokens_per_second_alone"],
        tokens_per_forward=measures["tokens_per_forward"],
    )


# ---- what is written ---------------------------------------------------------------------------------------
def _write(folder: Path, task: str, cells: list[Cell]) -> None:
    areas = _areas(cells)
    found = {
        "task": task,
        "cells": [asdict(cell) for cell in cells],
        "areas": [{"cache": cache, "block_size": size, **of} for (cache, size), of in areas.items()],
        "environment": record.machine(),
    }
    record.write(folder / "results.json", found)
    (folder / "table.md").write_text(table(task, cells))
    _plot(folder / "plot.svg", task, cells)


def _curves(cells: Sequence[Cell]) -> dict[tuple[str, int], list[Cell]]:
    curves: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        curves.setdefault((cell.cache, cell.block_size), []).append(cell)
    return curves


def _areas(cells: Sequence[Cell]) -> dict[tuple[str, int], dict[str, float]]:
    return {
        curve: {name: area_under([(getattr(cell, name), cell.accuracy) for cell in of]) for name in SPEEDS}
        for curve, of in _curves(cells).items()
    }


def table(task: str, cells: Sequence[Cell]) -> str:
    """Return the cells and the areas under accuracy as Markdown."""
    lines = [
        f"# {task}: accuracy beside speed",
        "",
        "| cache | block size | threshold | accuracy | tokens per second | tokens per forward |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        cache = cell.cache if cell.exact else f"{cell.cache} (approximate)"
        threshold = "one token per step" if cell.threshold is None else cell.threshold
        lines.append(
            f"| {cache} | {cell.block_size} | {threshold} | {cell.accuracy:.1%} | "
            f"{cell.tokens_per_second:.0f} | {cell.tokens_per_forward:.2f} |"
        )
    lines += [
        "",
        "Area under the best accuracy at a speed or a higher one:",
        "",
        "| cache | block size | over tokens per second | over tokens per forward |",
        "| --- | --- | --- | --- |",
    ]
    for (cache, size), area in _areas(cells).items():
        lines.append(
            f"| {cache} | {size} | {area['tokens_per_second']:.1f} | {area['tokens_per_forward']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _plot(path: Path, task: str, cells: Sequence[Cell]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), SPEEDS.items(), strict=True):
        for (cache, size), of in _curves(cells).items():
            points = sorted((getattr(cell, name), cell.accuracy) for cell in of)
            style = "-o" if of[0].exact else "--s"
            area = area_under(points)
            axes.plot(*zip(*points, strict=True), style, label=f"{cache}, block {size} (area {area:.3g})")
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.legend(fontsize="small")
    figure.axes[0].set_ylabel(f"{task}: accuracy")
    figure.savefig(path)
