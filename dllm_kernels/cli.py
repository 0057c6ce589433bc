"""The `dllm` command. Heavy imports stand inside the commands, so that `dllm --help` is quick."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Sample from, train and measure diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    pass


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """Print versions, what was built and picked, and what is missing with its remedy."""
    from rich.console import Console
    from rich.table import Table

    from dllm_kernels.info import collect

    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
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


Model = Annotated[str, typer.Option(help="tiny-python, a folder with a checkpoint, or a hub name.")]
Attention = Annotated[str | None, typer.Option(help="block_causal or bidirectional, if trained for both.")]
Threshold = Annotated[float | None, typer.Option(help="Commit every token at least this sure.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps in all, in place of a threshold.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option(help="Of the noise, at a temperature above 0.")]
Cache = Annotated[str, typer.Option(help="auto, none, block, prefix or dual.")]
View = Annotated[bool, typer.Option(help="Show the canvas while it fills, on a terminal.")]


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    model: Model = "tiny-python",
    max_new_tokens: Annotated[int, typer.Option(help="Length of the completion.")] = 128,
    attention: Attention = None,
    threshold: Threshold = None,
    steps: Steps = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    cache: Cache = "auto",
    view: View = True,
) -> None:
    """Continue a text. The text goes to standard output, the figures to standard error."""
    text = sys.stdin.read() if prompt == "-" else prompt
    options = dict(max_new_tokens=max_new_tokens, **_rule(threshold, steps))
    options |= dict(temperature=temperature, seed=seed, cache=cache)
    _generate("sample", text, model, attention, view, options)


@app.command()
def infill(
    file: Annotated[
        str, typer.Argument(help="A file with gaps written as <mask:24>; - reads standard input.")
    ],
    model: Model = "tiny-python",
    attention: Attention = None,
    threshold: Threshold = None,
    steps: Steps = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    cache: Cache = "auto",
    view: View = True,
) -> None:
    """Fill the gaps of a text. The text goes to standard output, the figures to standard error."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file}: {error}", param_hint="FILE") from None
    if attention is None and model == "tiny-python":
        attention = "bidirectional"
    options = _rule(threshold, steps) | dict(temperature=temperature, seed=seed, cache=cache)
    _generate("infill", text, model, attention, view, options)


@app.command()
def demo() -> None:
    """Complete a function and fill a gap with the embedded model, beside the plain loop."""
    from rich.console import Console

    from dllm_kernels.demo import run

    run(Console())


def _rule(threshold: float | None, steps: int | None) -> dict:
    if threshold is not None and steps is not None:
        raise typer.BadParameter("give --threshold or --steps, not both")
    return {"steps": steps} if steps is not None else {"threshold": 0.9 if threshold is None else threshold}


def _generate(operation: str, text: str, name: str, attention: str | None, view: bool, options: dict) -> None:
    """Run `dk.sample` or `dk.infill` on one text; errors of the user's making become one line."""
    from rich.console import Console

    import dllm_kernels as dk
    from dllm_kernels.viewer.terminal import TerminalView

    console = Console(stderr=True)
    try:
        model, tokenizer = dk.load(name, attention=attention)
        if tokenizer is None:
            raise ValueError(f"{name} has no tokenizer")
        generate = getattr(dk, operation)
        start = time.perf_counter()
        if view and console.is_terminal:
            with TerminalView(tokenizer, model.config.mask_token_id, console=console) as on_round:
                output = generate(model, text, tokenizer=tokenizer, on_round=on_round, **options)
        else:
            output = generate(model, text, tokenizer=tokenizer, **options)
        seconds = time.perf_counter() - start
    except (ValueError, TypeError, OSError, ImportError) as error:
        console.print(f"dllm {operation}: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    print((text if operation == "sample" else "") + output.texts[0])
    tokens = int(output.lengths[0])
    console.print(
        f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s; {output.forwards} forwards, "
        f"{output.tokens_per_forward:.2f} tokens per forward",
        style="dim",
    )


if __name__ == "__main__":
    app()
