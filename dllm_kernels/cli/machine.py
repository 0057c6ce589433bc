"""`dllm info`, `bench` and `demo`: what this machine has, and how fast it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dllm_kernels.cli.commands import MACHINE
from dllm_kernels.cli.narrow_help import Command

_INFO = """Print versions, what was built and picked, and what is missing with its remedy.

\b
[bold]Examples[/bold]
  dllm info
  dllm info --json
"""
_BENCH = """Measure this machine against what you would otherwise run, and print a table.

\b
[bold]Examples[/bold]
  dllm bench attention sampling
  dllm bench sampling --peer fast-dllm=DIR --report sampling.html
  dllm bench --smoke
"""


def add_to(app: typer.Typer) -> None:
    app.command(cls=Command, rich_help_panel=MACHINE, help=_BENCH, short_help="Measure this machine.")(bench)
    app.command(
        cls=Command,
        rich_help_panel=MACHINE,
        help=_INFO,
        short_help="Print versions, what was built, what is missing.",
    )(info)
    app.command(
        cls=Command,
        rich_help_panel=MACHINE,
        short_help="See what the embedded model does, beside the plain loop.",
    )(demo)


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    from rich.console import Console
    from rich.table import Table

    from dllm_kernels.cli.records import print_json
    from dllm_kernels.info import collect

    facts = collect()
    if as_json:
        print_json(facts)
        return
    missing = facts.pop("missing")
    lines = {
        name: value if isinstance(value, str) else ", ".join(value) or "none" for name, value in facts.items()
    }
    console = Console()
    if console.is_terminal:
        table = Table(show_header=False, box=None)
        for name, value in lines.items():
            table.add_row(f"[bold]{name}", value)
        console.print(table)
    else:
        for name, value in lines.items():
            print(f"{name}: {value}")
    for line in missing:
        print(f"missing - {line}")


def demo() -> None:
    """Add numbers, complete a method and fill a gap with the embedded model, beside the plain loop."""
    from rich.console import Console

    from dllm_kernels.demo import run

    run(Console())


def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(help="Such as attention or sampling; all unless given.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes, to see that it runs.")] = False,
    json: Annotated[Path | None, typer.Option(help="File to write the results to.")] = None,
    report: Annotated[Path | None, typer.Option(help="File to write an HTML page with plots to.")] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: a checkout of llada, fast-dllm or dllm; llama.cpp=PROGRAM."),
    ] = None,
    peer_python: Annotated[
        list[str] | None, typer.Option(help="NAME=PYTHON: the interpreter that runs the checkout.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time to spend on one comparison.")] = 2.0,
    folder: Annotated[Path | None, typer.Option(help="The benchmarks folder of a checkout.")] = None,
) -> None:
    from dllm_kernels import bench

    options = ["--seconds", str(seconds), *(["--smoke"] if smoke else [])]
    named = {"--json": [json], "--report": [report], "--peer": peer or [], "--peer-python": peer_python or []}
    for option, values in named.items():
        options += [f"{option}={value}" for value in values if value is not None]
    raise typer.Exit(bench.run(suites or [], options, folder))
