"""The `dllm` command. Commands import heavy modules themselves, so that `dllm --help` is quick.

Texts are read and written as UTF-8 bytes whatever the locale: given text comes out byte for byte.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup


class _Commands(TyperGroup):
    """Commands whose standard streams may be closed, full, or a pipe whose reader has left."""

    def main(self, *arguments, **options):
        if sys.stderr is None:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open to the end, as standard error is
        return super().main(*arguments, **options)

    def make_context(self, *arguments, **options):
        with _standard_output():
            return super().make_context(*arguments, **options)

    def invoke(self, context):
        with _standard_output():
            result = super().invoke(context)
            sys.stdout.flush()
            return result


@contextmanager
def _standard_output() -> Iterator[None]:
    """Turn a failure of standard output into a one-line error; a reader that left is no error."""
    if sys.stdout is None:
        _fail("standard output is closed", code=1)
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(128 + 13) from None  # as if SIGPIPE had ended it
        _fail(f"standard output cannot be written: {error.strerror}", code=1)


app = typer.Typer(
    cls=_Commands,
    help="Sample from, train and measure diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")


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
    chat: Annotated[bool, typer.Option("--chat", help="The text is a message; print the reply.")] = False,
) -> None:
    """Continue a text. The text goes to standard output, the figures to standard error."""
    text = _text(prompt, lambda: os.fsencode(prompt), "the prompt")
    options = dict(max_new_tokens=max_new_tokens, **_rule(threshold, steps))
    options |= dict(temperature=temperature, seed=seed, cache=cache, chat=chat)
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
    text = _text(file, lambda: Path(file).read_bytes(), file)
    if attention is None and model == "tiny-python":
        attention = "bidirectional"
    options = _rule(threshold, steps) | dict(temperature=temperature, seed=seed, cache=cache)
    _generate("infill", text, model, attention, view, options)


@app.command()
def demo() -> None:
    """Add numbers, complete a method and fill a gap with the embedded model, beside the plain loop."""
    from rich.console import Console

    from dllm_kernels.demo import run

    run(Console())


Base = Annotated[str | None, typer.Option(help="Base model of an adapter, unless it is where it was.")]
SaveDtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as before unless given.")]
SaveLayout = Annotated[str | None, typer.Option(help="A family's own layout, such as llada or Dream.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a checkpoint in TARGET.")]


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A folder, a hub name or a .gguf file.")],
    target: Annotated[str, typer.Argument(help="The folder to write.")],
    objective: Annotated[str | None, typer.Option(help="mdlm or bd3lm.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Of bd3lm; 32 unless given.")] = None,
    shift: Annotated[
        bool | None, typer.Option("--shift/--no-shift", help="Predict token i from the output at i-1.")
    ] = None,
    mask_token: Annotated[
        str | None, typer.Option(help="The tokenizer's own or <|mask|> unless given.")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="A file with a Jinja template.")] = None,
    dtype: SaveDtype = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder with a tokenizer.")] = None,
    base: Base = None,
    layout: SaveLayout = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a language model as a diffusion checkpoint that is ready to train."""
    with _writing():
        from dllm_train.convert import convert as write

        template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
        folder = write(
            source, target, objective=objective, block_size=block_size, shift=shift, mask_token=mask_token,
            chat_template=template, dtype=dtype, tokenizer=tokenizer, base=base, layout=layout,
            overwrite=overwrite,
        )  # fmt: skip
    print(folder)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="A folder or hub name of a peft adapter.")],
    target: Annotated[str, typer.Argument(help="The folder to write.")],
    base: Base = None,
    dtype: SaveDtype = None,
    layout: SaveLayout = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a peft adapter and its base model as one checkpoint."""
    with _writing():
        from dllm_train.merge import merge_adapter

        folder = merge_adapter(adapter, target, base=base, dtype=dtype, layout=layout, overwrite=overwrite)
    print(folder)


train = typer.Typer(help="Train a model by a recipe, whose options follow.", no_args_is_help=True)
app.add_typer(train, name="train")
_HANDED_OVER = {"allow_extra_args": True, "ignore_unknown_options": True}


@train.command(add_help_option=False, context_settings=_HANDED_OVER)
def finetune(context: typer.Context) -> None:
    """Train on prompts and replies; --help lists the options."""
    with _writing():
        from dllm_train.recipes import finetune, launch

    launch.run(finetune.finetune, context.args)


@train.command(add_help_option=False, context_settings=_HANDED_OVER)
def pretrain(context: typer.Context) -> None:
    """Train on documents; --help lists the options."""
    with _writing():
        from dllm_train.recipes import launch, pretrain

    launch.run(pretrain.pretrain, context.args)


@app.command("eval", add_help_option=False, context_settings=_HANDED_OVER)
def evaluate(context: typer.Context) -> None:
    """Evaluate a model on tasks of lm-eval, whose options follow; --help lists them."""
    try:
        from dllm_train.evaluate import command
    except ModuleNotFoundError as error:
        _fail(f'{error}; install the evaluation extras: pip install "dllm-kernels[eval]"')
    try:
        command.run(context.args)
    except command.Mistake as mistake:
        _fail(mistake, mistake.code)


@app.command()
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
    """Measure this machine against what you would otherwise run, and print a table."""
    from dllm_kernels import bench

    options = ["--seconds", str(seconds), *(["--smoke"] if smoke else [])]
    named = {"--json": [json], "--report": [report], "--peer": peer or [], "--peer-python": peer_python or []}
    for option, values in named.items():
        options += [f"{option}={value}" for value in values if value is not None]
    try:
        status = bench.run(suites or [], options, folder)
    except (ValueError, FileNotFoundError, ImportError) as error:
        _fail(error)
    raise typer.Exit(status)


@contextmanager
def _writing() -> Iterator[None]:
    """Turn user errors, and an incomplete dllm_train, into one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(f'{error}; install the training extras: pip install "dllm-kernels[train]"')
    except (ValueError, TypeError, OSError, ImportError) as error:
        _fail(error)


def _rule(threshold: float | None, steps: int | None) -> dict:
    if threshold is not None and steps is not None:
        raise typer.BadParameter("give --threshold or --steps, not both")
    return {"steps": steps} if steps is not None else {"threshold": 0.9 if threshold is None else threshold}


def _text(argument: str, read: Callable[[], bytes], name: str) -> str:
    """Return what `read` gives, called `name`, or standard input where the argument is -."""
    try:
        if argument == "-":
            name, read = "standard input", lambda: sys.stdin.buffer.read()
            if sys.stdin is None:
                _fail(f"{name} is closed")
        return read().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        _fail(f"{name} is not UTF-8: byte 0x{byte:02x} at offset {error.start} ({error.reason})")
    except UnicodeEncodeError as error:
        _fail(f"{name} is not UTF-8: {error.reason} at character {error.start}")
    except (OSError, ValueError) as error:
        _fail(f"{name}: {getattr(error, 'strerror', None) or error}")


def _write(text: str) -> None:
    """Write a text to standard output as it is; a terminal gets a line end after it."""
    data = text.encode()
    if sys.stdout.isatty() and not data.endswith(b"\n"):
        data += b"\n"
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _fail(reason: object, code: int = 2) -> NoReturn:
    """Print a one-line error and end the command."""
    from rich.console import Console

    line = f"dllm: {reason}"
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _generate(operation: str, text: str, name: str, attention: str | None, view: bool, options: dict) -> None:
    """Run `dk.sample` or `dk.infill` on one text; user errors become one line."""
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
        _fail(error)
    continued = operation == "sample" and not options["chat"]
    _write((text if continued else "") + output.texts[0])
    tokens = int(output.lengths[0])
    console.print(
        f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s; {output.forwards} forwards, "
        f"{output.tokens_per_forward:.2f} tokens per forward",
        style="dim",
        soft_wrap=True,
    )


if __name__ == "__main__":
    app(prog_name="dllm")
