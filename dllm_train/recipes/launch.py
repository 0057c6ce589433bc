"""The command line of the recipes: options, one-line errors, and processes that train together."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser

from dllm_train.process_group import end_process

_MISTAKES = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
_PATIENCE = 3.0  # seconds in which the launcher ends the other processes of a failed one


def run(recipe: Callable[[list[str]], None], arguments: list[str] | None = None) -> None:
    """Call `recipe` with the command line; bad input ends the process with one line and code 2.

    The line comes from rank 0. Another rank prints its own only if rank 0 did not fail too, since the
    launcher ends it otherwise. No rank waits for one that failed. DLLM_DEBUG=1 keeps the tracebacks.
    """
    try:
        recipe(sys.argv[1:] if arguments is None else arguments)
    except _MISTAKES as error:
        if os.environ.get("DLLM_DEBUG") == "1":
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(_PATIENCE)
        where = f" (rank {rank})" if rank else ""
        line = " ".join(str(error).split())
        print(f"{recipe.__name__}{where}: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # without the exit handlers of torch, which would wait for the other processes
    end_process()


def parse(kinds: Sequence[type], arguments: list[str]) -> tuple:
    """Return an instance of each dataclass of `kinds`, the last of which are training arguments.

    A first argument that ends in .yaml, .yml or .json is a file of options; later arguments override it.
    """
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        arguments = [*_options_of(Path(arguments[0])), *arguments[1:]]
    parser = _Parser(kinds, allow_abbrev=False)
    if not torch.accelerator.is_available():
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            parser.set_defaults(ddp_backend="gloo")
        else:
            parser.set_defaults(use_cpu=True)
    *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown options: {' '.join(unknown)}; --help lists all")
    _check_processes(parsed[-1])
    return tuple(parsed)


class _Parser(HfArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            action.nargs = "*" if action.nargs == "+" else action.nargs  # lists may be empty

    def error(self, message):
        raise ValueError(message)


def _options_of(file: Path) -> list[str]:
    entries = yaml.safe_load(file.read_text())
    if not isinstance(entries, dict):
        raise ValueError(f"{file} holds a {type(entries).__name__}; expected options by name")
    options = []
    for name, value in entries.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        texts = [json.dumps(each) if isinstance(each, dict) else str(each) for each in values]
        options += [f"--{name}", *texts]
    return options


def _check_processes(training_args) -> None:
    """Refuse launches in which processes would silently train apart, or not be sharded as asked for."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if training_args.world_size != started:
        raise ValueError(
            f"{started} processes were started, which would each train alone on {training_args.device}; "
            "start one, or give --use_cpu True"
        )
    if training_args.use_cpu and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "FSDP needs a GPU for each process: accelerate makes it DistributedDataParallel on CPUs. Use "
            "the configuration cpu, or zero3, which shards on CPUs too"
        )
