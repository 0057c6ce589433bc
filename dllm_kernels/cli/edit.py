"""`dllm edit`: new lines in a file, as a diff, and written only when that is asked for."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path
from typing import Annotated

import typer

from dllm_kernels.cli.commands import GENERATE
from dllm_kernels.cli.models import Attention, Device, Dtype, Model, Weights, busy, load
from dllm_kernels.cli.options import Infilling, given
from dllm_kernels.cli.sample import Colour, Json, Pause, Preset, View, live_view
from dllm_kernels.cli.streams import LARGEST, check_writable, file_bytes, write_file, write_text

_EDIT = """Propose new lines for a file, filled in between those around them, as a unified diff.

Nothing is written without --write. The model sees the lines before and behind.

\b
[bold]Examples[/bold]
  dllm edit module.py --lines 10-14
  dllm edit module.py --lines 10-14 --tokens 24
  dllm edit module.py --lines 10-14 --write
  dllm edit module.py --lines 7 | git apply
"""


def add_to(app: typer.Typer) -> None:
    app.command(
        cls=Infilling,
        rich_help_panel=GENERATE,
        help=_EDIT,
        short_help="Propose new lines for a file, as a diff.",
    )(edit)


def edit(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A text file.", show_default=False)],
    lines: Annotated[str, typer.Option("--lines", "-l", help="Lines to replace: 10-14, or 7.")],
    tokens: Annotated[
        str, typer.Option(help="Tokens of the new lines; auto fills several lengths and takes the likeliest.")
    ] = "auto",
    write: Annotated[bool, typer.Option("--write", help="Write the file, at once or not at all.")] = False,
    model: Model = "tiny-python",
    attention: Attention = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    preset: Preset = None,
    json: Json = False,
    view: View = True,
    colour: Colour = "step",
    pause: Pause = 0.0,
) -> None:
    from rich.console import Console

    options = given(context, preset)
    first, last = _lines(lines)
    count = _tokens(tokens)
    data = _bytes_of(file)
    if write:
        check_writable(file.resolve())
    text = _decoded(file, data)
    loaded, tokenizer = load(model, attention, device, dtype, weights, infills=True)
    from dllm_kernels.edit import propose

    console = Console(stderr=True)
    watched = live_view("infill", loaded, tokenizer, options, console, colour, pause)
    if not view or watched is None or count == "auto":
        watched = None
    name = _shown_name(file)
    with watched or busy(f"filling lines {lines} of {name}"):
        proposal = propose(
            loaded, text, first, last, tokenizer=tokenizer, tokens=count, name=name, on_round=watched,
            **options,
        )  # fmt: skip
    best = proposal.candidates[0]
    if write and proposal.diff:
        if _bytes_of(file) != data:
            raise ValueError(f"{file} was changed while its new lines were made; nothing is written")
        write_file(file, proposal.text.encode())
    if json:
        from dllm_kernels.cli.records import print_json

        print_json(
            {
                "file": str(file), "lines": [first, last], "diff": proposal.diff, "text": best.text,
                "tokens": best.tokens, "mean_logprob": round(best.mean_logprob, 6),
                "candidates": [
                    {"text": one.text, "tokens": one.tokens, "mean_logprob": round(one.mean_logprob, 6)}
                    for one in proposal.candidates
                ],
                "seen": list(proposal.seen), "written": write and bool(proposal.diff),
            }
        )  # fmt: skip
        return
    _print_diff(proposal.diff)
    tried = f", best of {len(proposal.candidates)} lengths" if len(proposal.candidates) > 1 else ""
    line = f"{best.tokens} tokens{tried}, {best.mean_logprob:.2f} nats per token; the model saw lines "
    line += f"{proposal.seen[0]}-{proposal.seen[1]}; "
    if not proposal.diff:
        line += "it proposes what is there already"
    else:
        line += f"written to {file}" if write else "nothing is written without --write"
    console.print(line, style="dim", soft_wrap=True, highlight=False, markup=False)


def _lines(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", text)
    if not found or not 1 <= int(found[1]) <= int(found[2] or found[1]):
        raise ValueError(f"--lines is {text!r}; give a line or a range of lines from 1, such as 7 or 10-14")
    return int(found[1]), int(found[2] or found[1])


def _tokens(text: str) -> int | str:
    if text == "auto":
        return text
    if not re.fullmatch("[0-9]{1,7}", text) or not int(text):
        raise ValueError(f"--tokens is {text!r}; give a number from 1, or auto")
    return int(text)


def _bytes_of(file: Path) -> bytes:
    """Return what is in a regular file of less than LARGEST bytes."""
    found = file.stat()
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{file} is a folder; give a file")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file} is not a regular file")
    if found.st_size > LARGEST:
        raise ValueError(f"{file} is larger than {LARGEST // 2**20} MiB, the most that is read as one text")
    return file_bytes(file)


def _decoded(file: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(f"{file} is not UTF-8: byte 0x{byte:02x} at offset {error.start}") from None
    if "\0" in text:
        raise ValueError(f"{file} holds a null byte, so it is no text")
    return text


def _shown_name(file: Path) -> str:
    """Return the name for the diff: relative to the current folder, as `git apply` wants it."""
    relative = os.path.relpath(file)
    return file.name if relative.startswith("..") else relative


def _print_diff(diff: str) -> None:
    """Write a diff to standard output, in colours on a terminal."""
    if not sys.stdout.isatty():
        write_text(diff)
        return
    from rich.console import Console
    from rich.text import Text

    from dllm_kernels.viewer.control_characters import harmless

    styles = {"+++": "bold", "---": "bold", "@@ ": "cyan", "+": "green", "-": "red"}
    for line in harmless(diff).splitlines():
        style = next((style for start, style in styles.items() if line.startswith(start)), "")
        Console().print(Text(line, style=style), soft_wrap=True)
