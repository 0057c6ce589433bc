"""`dllm sample`, `dllm infill` and `dllm choose`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dllm_kernels.cli.commands import GENERATE, fail
from dllm_kernels.cli.models import Attention, Device, Dtype, Model, Weights, load, one_of
from dllm_kernels.cli.narrow_help import Command
from dllm_kernels.cli.options import Infilling, Sampling, assignments, given, with_rule
from dllm_kernels.cli.partial import Partial
from dllm_kernels.cli.streams import check_writable, file_text, given_text, write_file, write_text
from dllm_kernels.viewer import COLOURS

OUTPUT, VIEW = "Input and output", "Live view and replay"
_TOGETHER = 32  # prompts of a file that are in flight at once, unless --max-batch says another number

_PRESETS = ("llada", "fast_dllm", "dream", "bd3lm", "llada2")  # of SampleConfig, whose import takes a second


def _known_colour(colour: str) -> str:
    if colour not in COLOURS:
        raise ValueError(f"colour is {colour!r}; allowed: {', '.join(COLOURS)}")
    return colour


Preset = Annotated[
    str | None,
    typer.Option(
        help=f"Published settings, which other options override: {', '.join(_PRESETS)}.",
        autocompletion=one_of(*_PRESETS),
    ),
]
View = Annotated[
    bool, typer.Option(help="Show the canvas while it fills, on a terminal.", rich_help_panel=VIEW)
]
Colour = Annotated[
    str,
    typer.Option(
        "--colour",
        "--color",
        help="step: when a token was committed; confidence: how sure it was.",
        rich_help_panel=VIEW,
        callback=_known_colour,
        autocompletion=one_of(*COLOURS),
    ),
]
Pause = Annotated[float, typer.Option(help="Seconds to wait after every step.", min=0, rich_help_panel=VIEW)]
Replay = Annotated[
    Path | None, typer.Option(help="Write a page that replays the run, step by step.", rich_help_panel=VIEW)
]
Compare = Annotated[
    str | None,
    typer.Option(
        help="A second run with other options, such as threshold=0.6,cache=none.", rich_help_panel=VIEW
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]
Jsonl = Annotated[
    str | None,
    typer.Option(
        help='A file of prompts, one a line: "..." or {"prompt": ..., "id": ...}; - reads standard input.',
        rich_help_panel=OUTPUT,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A file in place of standard output.", rich_help_panel=OUTPUT),
]

_SAMPLE = """Continue a text. The text goes to standard output, the figures to standard error.

\b
[bold]Examples[/bold]
  dllm sample "def fibonacci(n):"
  dllm sample - --temperature 0.7 --seed 1 < prompt.txt
  dllm sample "Explain diffusion." --model DIR --chat --max-new-tokens 256
  dllm sample --jsonl prompts.jsonl --output completions.jsonl
  dllm sample "x = [" --replay run.html --compare threshold=0.6
"""
_INFILL = """Fill the gaps of a text. The text goes to standard output, the figures to standard error.

\b
[bold]Examples[/bold]
  dllm infill gapped.py
  echo "def add(a, b): return <mask:4>" | dllm infill -
  dllm infill gapped.py --steps 4 --json
  echo "print(1 + 1 == <mask:1>)" | dllm infill - --allow 2 --allow 3
  dllm infill draft.py --draft --edit-threshold 0.95
  dllm infill --jsonl canvases.jsonl --output filled.jsonl
"""
_CHOOSE = """Compare given continuations by their probability, from one forward of the model.

\b
[bold]Examples[/bold]
  dllm choose "assert 2 + 2 == " --choice 4 --choice 5
  dllm choose - --choice yes --choice no --json < question.txt
"""


def add_to(app: typer.Typer) -> None:
    app.command(cls=Sampling, rich_help_panel=GENERATE, help=_SAMPLE, short_help="Continue a text, or many.")(
        sample
    )
    app.command(
        cls=Infilling,
        rich_help_panel=GENERATE,
        help=_INFILL,
        short_help="Fill the gaps of a text, or of many.",
    )(infill)
    app.command(
        cls=Command,
        rich_help_panel=GENERATE,
        help=_CHOOSE,
        short_help="Compare continuations by their probability.",
    )(choose)


def sample(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads standard input.", show_default=False)
    ] = None,
    model: Model = "tiny-python",
    attention: Attention = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    preset: Preset = None,
    jsonl: Jsonl = None,
    output: Output = None,
    json: Json = False,
    view: View = True,
    colour: Colour = "step",
    pause: Pause = 0.0,
    replay: Replay = None,
    compare: Compare = None,
) -> None:
    options = given(context, preset)
    where = Where(output, json, view, colour, pause, replay, compare)
    load_model = partial(load, model, attention, device, dtype, weights)
    if _is_file_of_prompts(prompt, "PROMPT", jsonl, where):
        _run_file("sample", jsonl, output, load_model, options)
        return
    _run_one("sample", given_text(prompt, "the prompt"), load_model, options, where)


def infill(
    context: typer.Context,
    file: Annotated[
        str | None,
        typer.Argument(
            help="A file with gaps written as <mask:24>; - reads standard input.", show_default=False
        ),
    ] = None,
    model: Model = "tiny-python",
    attention: Attention = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    preset: Preset = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="The given text may change too, by --edit-threshold.")
    ] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="A token that may fill a gap; give several, and no others may.")
    ] = None,
    jsonl: Jsonl = None,
    output: Output = None,
    json: Json = False,
    view: View = True,
    colour: Colour = "step",
    pause: Pause = 0.0,
    replay: Replay = None,
    compare: Compare = None,
) -> None:
    options = given(context, preset)
    options |= {"pinned": False} if draft else {}
    options |= {"allowed": allow} if allow else {}
    where = Where(output, json, view, colour, pause, replay, compare)
    load_model = partial(load, model, attention, device, dtype, weights, infills=True)
    if _is_file_of_prompts(file, "FILE", jsonl, where):
        _run_file("infill", jsonl, output, load_model, options)
        return
    _run_one("infill", file_text(file), load_model, options, where)


def choose(
    prompt: Annotated[str, typer.Argument(help="Text before the choices; - reads standard input.")],
    choice: Annotated[list[str], typer.Option("--choice", "-c", help="A continuation; give several.")],
    normalize: Annotated[str, typer.Option(help="sum, or mean: compare the choices per token.")] = "sum",
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, the choices replies.")
    ] = False,
    model: Model = "tiny-python",
    attention: Attention = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    json: Json = False,
) -> None:
    from dllm_kernels.cli.records import print_json

    text = given_text(prompt, "the prompt")
    loaded, tokenizer = load(model, attention, device, dtype, weights)
    import dllm_kernels as dk

    found = dk.choose(loaded, text, choice, tokenizer=tokenizer, normalize=normalize, chat=chat)
    rows = list(zip(choice, found.probabilities.tolist(), found.logprobs.tolist(), strict=True))
    if json:
        choices = [
            {"text": name, "probability": round(probability, 6), "logprob": round(logprob, 6)}
            for name, probability, logprob in rows
        ]
        print_json({"prompt": text, "choices": choices})
        return
    for name, probability, _ in sorted(rows, key=lambda row: -row[1]):
        write_text(f"{probability:.4f}  {name}\n")


@dataclass(frozen=True)
class Where:
    """Where the result of one run goes, and what is seen of the run."""

    output: Path | None
    json: bool
    view: bool
    colour: str
    pause: float
    replay: Path | None
    compare: str | None

    def check(self) -> None:
        """Refuse what cannot be written before there is anything to write."""
        for target in (self.output, self.replay):
            if target is not None:
                check_writable(target.resolve())


def _is_file_of_prompts(argument: str | None, name: str, jsonl: str | None, where: Where) -> bool:
    """Return whether the prompts are in a file; ValueError for both or neither, and for what goes with one
    text alone."""
    where.check()
    if jsonl is None and argument is None:
        raise ValueError(f"give {name}, or --jsonl FILE for many")
    if jsonl is not None and argument is not None:
        raise ValueError(f"give {name} or --jsonl, not both")
    if jsonl is not None and (where.replay or where.compare or where.json):
        raise ValueError("--json, --replay and --compare go with one text; --jsonl writes a line for each")
    return jsonl is not None


def _run_one(operation: str, text: str, load_model, options: dict, where: Where) -> None:
    """Run `dk.sample` or `dk.infill` on one text, print the result and the figures."""
    from rich.console import Console

    from dllm_kernels.cli.records import line_of, print_json, record

    others = None if where.compare is None else assignments(where.compare)
    if where.replay is not None:
        options = {"logprobs": 4, **options, "history": True}
    model, tokenizer = load_model()
    console = Console(stderr=True)
    if others is not None:  # neither run is the first one, which allocates
        _run(operation, model, text, tokenizer, options)
    output, seconds = _watched(operation, model, text, tokenizer, options, where, console)
    runs = {_named(options): output}
    continued = operation == "sample" and not _option(options, "chat")
    result = (text if continued else "") + output.texts[0]
    if where.json:
        fields = record(output, 0, text) | {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(int(output.lengths[0]) / seconds, 2),
            "tokens_per_forward": round(output.tokens_per_forward, 4),
        }  # fmt: skip
        result = line_of(fields)
        if where.output is None:
            print_json(fields)
    elif where.output is None:
        write_text(result)
    if where.output is not None:
        write_file(where.output, result.encode())
    console.print(figures(output, seconds), style="dim", soft_wrap=True, highlight=False)
    if others is not None:
        merged = with_rule({**_without_rule_of(options, others), **others})
        second, seconds = _watched(operation, model, text, tokenizer, merged, where, console)
        runs[f"{where.compare} (second)" if where.compare in runs else where.compare] = second
        same = "the same text" if second.texts == output.texts else "another text"
        line = f"{where.compare}: {figures(second, seconds)}; {same}"
        console.print(line, style="dim", soft_wrap=True, highlight=False, markup=False)
    if where.replay is not None:
        from dllm_kernels.viewer.replay import write_replay

        write_replay(where.replay.resolve(), runs, tokenizer, mask_id=mask_id_of(model, tokenizer, options))
        console.print(f"replay: {where.replay}", style="dim", soft_wrap=True, markup=False, highlight=False)


def _watched(operation: str, model, text: str, tokenizer, options: dict, where: Where, console):
    """Return the SampleOutput and the seconds of a run, which is shown while it goes on if it can be. A
    completion that is interrupted then is printed as far as it stands."""
    view = live_view(operation, model, tokenizer, options, console, where.colour, where.pause)
    start = time.perf_counter()
    if view is None or not where.view:
        output = _run(operation, model, text, tokenizer, options)
        return output, time.perf_counter() - start
    standing = Partial(tokenizer, view.mask_id)

    def seen(event) -> None:
        standing(event)
        view(event)

    try:
        with view:
            output = _run(operation, model, text, tokenizer, options, seen)
    except KeyboardInterrupt:
        if operation == "sample" and where.output is None and not where.json:
            write_text(("" if _option(options, "chat") else text) + standing.text())
        raise
    return output, time.perf_counter() - start - view.paused


def _run(operation: str, model, text: str, tokenizer, options: dict, on_round=None):
    """Return the SampleOutput of `dk.sample` or `dk.infill`."""
    import dllm_kernels as dk

    return getattr(dk, operation)(model, text, tokenizer=tokenizer, on_round=on_round, **options)


def live_view(
    operation: str, model, tokenizer, options: dict, console, colour: str, pause: float, start: int = 0
):
    """Return a view of a run of `operation` on the console; None if it cannot be drawn on. start: the first
    position to show."""
    from dllm_kernels.viewer.terminal import TerminalView

    if not console.is_terminal or console.is_dumb_terminal:
        return None
    kinds = model.config.diffusion["attention"]
    return TerminalView(
        tokenizer, mask_id_of(model, tokenizer, options), console=console, colour=colour, pause=pause,
        block_size=_option(options, "block_size") or model.config.diffusion.get("block_size"),
        origin=None if operation == "sample" and kinds[0] == "bidirectional" else 0, start=start,
    )  # fmt: skip


def figures(output, seconds: float) -> str:
    tokens = int(output.lengths[0])
    return (
        f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s; {output.forwards} forwards, "
        f"{output.tokens_per_forward:.2f} tokens per forward"
    )


def _run_file(operation: str, jsonl: str, target: Path | None, load_model, options: dict) -> None:
    """Run a file of prompts, some at a time, and write a record of each in the order of the file."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dllm_kernels.cli.records import by_line, lines_to, read_prompts, record

    prompts = read_prompts(jsonl, messages=bool(_option(options, "chat")))
    model, tokenizer = load_model()
    import dllm_kernels as dk

    generate = getattr(dk, operation)
    size = _option(options, "max_batch") or _TOGETHER
    console = Console(stderr=True)
    # A terminal that shows the lines as they come needs no bar between them.
    quiet = not console.is_terminal or console.is_dumb_terminal or (target is None and sys.stdout.isatty())
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    rate = TextColumn("{task.fields[rate]}")
    tokens, start = 0, time.perf_counter()
    with (
        lines_to(target) as lines,
        Progress(*columns, rate, console=console, disable=quiet, transient=True) as bar,
    ):
        task = bar.add_task(operation, total=len(prompts), rate="")
        try:
            for first in range(0, len(prompts), size):
                some = prompts[first : first + size]
                numbers = range(first, first + len(some))
                try:
                    output = generate(
                        model, [one.text for one in some], tokenizer=tokenizer, row_ids=numbers, **options
                    )
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{by_line(error, some, jsonl)}{lines.kept}") from error
                for row, one in enumerate(some):
                    lines.write(record(output, row, one.text, one.id))
                tokens += int(output.lengths.sum())
                seconds = time.perf_counter() - start
                bar.update(task, advance=len(some), rate=f"{tokens / seconds:.0f} tokens/s")
        except KeyboardInterrupt:
            fail(f"interrupted{lines.kept}", 130)
    seconds = time.perf_counter() - start
    console.print(
        f"{len(prompts)} texts, {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s",
        style="dim", soft_wrap=True, highlight=False,
    )  # fmt: skip


def _option(options: dict, name: str):
    """Return an option of a run, given by itself or by its config; None if it is neither."""
    if name in options:
        return options[name]
    return getattr(options["config"], name) if "config" in options else None


def mask_id_of(model, tokenizer, options: dict) -> int:
    given_id, own = _option(options, "mask_id"), model.config.mask_token_id
    return next(token for token in (given_id, own, tokenizer.mask_token_id) if token is not None)


def _without_rule_of(options: dict, others: dict) -> dict:
    """Return options without the numbers of their rule where the others name another one."""
    from dllm_kernels.sampling.config import RULES

    numbers = {*(need for row in RULES.values() for need in row.needs), "rule", "steps", "steps_per_block"}
    if numbers.isdisjoint(others):
        return options
    return {name: value for name, value in options.items() if name not in numbers}


def _named(options: dict) -> str:
    """Return what a run is called beside another."""
    shown = {name: value for name, value in options.items() if name not in ("history", "logprobs", "config")}
    return ",".join(f"{name}={value}" for name, value in shown.items()) or "defaults"
