"""The help of a command in a terminal that is too narrow for tables: one entry below the other."""

from __future__ import annotations

import shutil

from typer.core import TyperCommand, TyperGroup

NARROW = 50  # columns that tables need


def print_narrow_help(command, context) -> None:
    """Print usage, text, and each command or option with its help below it."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(width=max(shutil.get_terminal_size().columns, 10), highlight=False)
    entries = [(" ".join(one.opts + one.secondary_opts), one.help) for one in command.get_params(context)]
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        entries.append((name, command.get_command(context, name).get_short_help_str(limit=200)))
    console.print(Text(f"{context.command_path} {' '.join(command.collect_usage_pieces(context))}", "bold"))
    console.print(Text.from_markup((command.help or "").replace("\b\n", "")))
    for name, text in entries:
        console.print(Text(name, "cyan", overflow="fold"))
        if text:
            console.print(Padding(Text.from_markup(text), (0, 0, 0, 1)))


class _Readable:
    """A command whose help can be read in a narrow terminal too."""

    def format_help(self, context, formatter) -> None:
        if shutil.get_terminal_size().columns < NARROW:
            print_narrow_help(self, context)
        else:
            super().format_help(context, formatter)


class Command(_Readable, TyperCommand):
    """A command, with help for every width."""


class Group(_Readable, TyperGroup):
    """Commands, with help for every width."""
