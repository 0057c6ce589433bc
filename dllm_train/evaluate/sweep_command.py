"""`dllm eval sweep`: the command line of `sweep`."""

from __future__ import annotations

import argparse

from lm_eval.utils import simple_parse_args_string

from dllm_train.evaluate.sweep import sweep, table


def run(arguments: list[str]) -> None:
    """Sweep as the command line says and print the table."""
    given = _parser().parse_args(arguments)
    cells = sweep(
        simple_parse_args_string(given.model_args),
        given.task,
        thresholds=_listed("thresholds", given.thresholds, _threshold),
        caches=_listed("caches", given.caches, str),
        block_sizes=_listed("block_sizes", given.block_sizes, int),
        output=given.output,
        metric=given.metric,
        limit=given.limit,
    )
    print(table(given.task, cells))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dllm eval sweep",
        description="Run a task with every combination of threshold, cache and block size, one request at a "
        "time, and write accuracy beside speed into a folder. The same command resumes.",
    )
    parser.add_argument("--model_args", required=True, metavar="pretrained=…,…", help="as of dllm eval")
    parser.add_argument("--task", required=True, help="one task that generates")
    parser.add_argument("--thresholds", default="0.5,0.7,0.9,none", help="none: one token per step")
    parser.add_argument("--caches", default="auto", help="auto, none, prefix, dual or block")
    parser.add_argument("--block_sizes", default="32")
    parser.add_argument("--output", required=True, metavar="DIR", help="where cells, table and plot are kept")
    parser.add_argument("--metric", help="the score that is the accuracy (default: the task's first)")
    parser.add_argument("--limit", type=int, help="documents to run")
    return parser


def _threshold(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _listed(name: str, text: str, read) -> list:
    try:
        return [read(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} is {text!r}; expected values separated by commas") from None
