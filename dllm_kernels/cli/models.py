"""The model of a command, loaded while a line on the terminal says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

MODEL_PANEL = "Model"


def _names(incomplete: str) -> list[str]:
    from dllm_kernels.models.checkpoint import EMBEDDED

    return [name for name in EMBEDDED if name.startswith(incomplete)]


def one_of(*names: str):
    """Return what completes an option that takes one of `names`."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="tiny-python, a folder with a checkpoint, or a hub name.",
        rich_help_panel=MODEL_PANEL,
        autocompletion=_names,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="block_causal or bidirectional, if trained for both.",
        rich_help_panel=MODEL_PANEL,
        autocompletion=one_of("block_causal", "bidirectional"),
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Such as cpu or cuda:0; the GPU if there is one.", rich_help_panel=MODEL_PANEL),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16; by the device unless given.",
        rich_help_panel=MODEL_PANEL,
        autocompletion=one_of("float32", "bfloat16", "float16"),
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="How linear layers store their weights: float32, bfloat16 or int8; on a GPU also fp8.",
        rich_help_panel=MODEL_PANEL,
        autocompletion=one_of("float32", "bfloat16", "int8", "fp8"),
    ),
]


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show `what` is going on, on a terminal, until it is done."""
    from rich.console import Console
    from rich.text import Text

    from dllm_kernels.viewer.control_characters import harmless

    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with console.status(Text(harmless(what), no_wrap=True, overflow="ellipsis")):
        yield


def load(
    name: str,
    attention: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    *,
    infills: bool = False,
):
    """Return (model, tokenizer). infills: take bidirectional attention where the checkpoint has it."""
    # The hub shows the progress of its own downloads.
    local = name == "tiny-python" or Path(name).expanduser().exists()
    with busy(f"loading {name}") if local else nullcontext():
        from transformers.utils import logging

        import dllm_kernels as dk
        from dllm_kernels.models.checkpoint import attentions

        logging.set_verbosity_error()  # a mistake is one line, ours
        if attention is None and infills and "bidirectional" in attentions(name):
            attention = "bidirectional"
        model, tokenizer = dk.load(name, device=device, dtype=dtype, attention=attention, weights=weights)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer")
    return model, tokenizer
