"""The `dllm` command: one file per group of commands.

    commands.py   the group, and what ends a command: one line and an exit code
    narrow_help.py   help where there is no room for tables
    options.py    the options of `dk.SampleConfig`, made from its fields
    streams.py, records.py   text in and out; JSON and JSONL
    partial.py    what stands of a completion that was stopped
    models.py     the model of a command
    sample.py     sample, infill, choose
    edit.py, chat.py
    training.py   convert, merge, train, eval
    machine.py    bench, info, demo

Commands import heavy modules themselves, so that `dllm --help` is quick.
"""

from dllm_kernels.cli import chat, edit, machine, sample, training
from dllm_kernels.cli.commands import app

sample.add_to(app)
edit.add_to(app)
chat.add_to(app)
training.add_to(app)
machine.add_to(app)

__all__ = ["app"]
