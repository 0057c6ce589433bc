"""`dllm convert`, `merge`, `train` and `eval`: what dllm_train does, as commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dllm_kernels.cli.commands import MODELS, fail
from dllm_kernels.cli.models import busy
from dllm_kernels.cli.narrow_help import Command, Group

Base = Annotated[str | None, typer.Option(help="Base model of an adapter, unless it is where it was.")]
SaveDtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as before unless given.")]
SaveLayout = Annotated[str | None, typer.Option(help="A family's own layout, such as llada or Dream.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a checkpoint in TARGET.")]

_CONVERT = """Write a language model as a diffusion checkpoint that is ready to train.

\b
[bold]Examples[/bold]
  dllm convert HuggingFaceTB/SmolLM2-135M smollm2-mdlm --objective mdlm
  dllm convert model.gguf converted --objective bd3lm --block-size 32
"""
_MERGE = """Write a peft adapter and its base model as one checkpoint.

\b
[bold]Examples[/bold]
  dllm merge runs/lora merged
  dllm merge runs/lora merged --base ./base --dtype bfloat16
"""
_TRAIN = """Train a model by a recipe, whose options follow.

\b
[bold]Examples[/bold]
  dllm train finetune --help
  dllm train finetune --model_name_or_path DIR --dataset_args DATA --output_dir runs/sft
"""
_HANDED_OVER = {"allow_extra_args": True, "ignore_unknown_options": True}


def add_to(app: typer.Typer) -> None:
    app.command(
        cls=Command,
        rich_help_panel=MODELS,
        help=_CONVERT,
        short_help="Write a model as a diffusion checkpoint.",
    )(convert)
    app.command(
        cls=Command, rich_help_panel=MODELS, help=_MERGE, short_help="Write an adapter and its base as one."
    )(merge)
    train = typer.Typer(cls=Group, help=_TRAIN, short_help="Train a model by a recipe.", no_args_is_help=True)
    train.command(add_help_option=False, context_settings=_HANDED_OVER)(finetune)
    train.command(add_help_option=False, context_settings=_HANDED_OVER)(pretrain)
    app.add_typer(train, name="train", rich_help_panel=MODELS)
    app.command(
        "eval",
        rich_help_panel=MODELS,
        short_help="Evaluate a model on tasks of lm-eval.",
        add_help_option=False,
        context_settings=_HANDED_OVER,
    )(evaluate)


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
    weights: Annotated[
        str | None, typer.Option(help="bfloat16 or int8, for linear layers; to sample, not to train.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder with a tokenizer.")] = None,
    base: Base = None,
    layout: SaveLayout = None,
    overwrite: Overwrite = False,
) -> None:
    with _training_extras(), busy(f"converting {source}"):
        from dllm_train.convert import convert as write

        template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
        folder = write(
            source, target, objective=objective, block_size=block_size, shift=shift, mask_token=mask_token,
            chat_template=template, dtype=dtype, weights=weights, tokenizer=tokenizer, base=base,
            layout=layout, overwrite=overwrite,
        )  # fmt: skip
    print(folder)


def merge(
    adapter: Annotated[str, typer.Argument(help="A folder or hub name of a peft adapter.")],
    target: Annotated[str, typer.Argument(help="The folder to write.")],
    base: Base = None,
    dtype: SaveDtype = None,
    layout: SaveLayout = None,
    overwrite: Overwrite = False,
) -> None:
    with _training_extras(), busy(f"merging {adapter}"):
        from dllm_train.merge import merge_adapter

        folder = merge_adapter(adapter, target, base=base, dtype=dtype, layout=layout, overwrite=overwrite)
    print(folder)


def finetune(context: typer.Context) -> None:
    """Train on prompts and replies; --help lists the options."""
    with _training_extras():
        from dllm_train.recipes import finetune, launch

    launch.run(finetune.finetune, context.args)


def pretrain(context: typer.Context) -> None:
    """Train on documents; --help lists the options."""
    with _training_extras():
        from dllm_train.recipes import launch, pretrain

    launch.run(pretrain.pretrain, context.args)


def evaluate(context: typer.Context) -> None:
    """Evaluate a model on tasks of lm-eval, whose options follow; --help lists them."""
    try:
        from dllm_train.evaluate import command
    except ModuleNotFoundError as error:
        fail(f'{error}; install the evaluation extras: pip install "dllm-kernels[eval]"')
    try:
        command.run(context.args)
    except command.Mistake as mistake:
        fail(mistake, mistake.code)


@contextmanager
def _training_extras() -> Iterator[None]:
    """Name the remedy where dllm_train is incomplete."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f'{error}; install the training extras: pip install "dllm-kernels[train]"')
