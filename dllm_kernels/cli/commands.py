"""The group of commands: what their standard streams may be, and how each of them ends.

Exit codes: 0 done; 1 failed; 2 bad input; 130 interrupted by Ctrl-C; 141 the reader of standard output left.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from dllm_kernels.cli.narrow_help import Group
from dllm_kernels.viewer.control_characters import harmless

FAILED, BAD_INPUT, INTERRUPTED, READER_LEFT = 1, 2, 130, 141
GENERATE, MODELS, MACHINE = PANELS = ("Generate", "Models", "This machine")  # of `dllm --help`
_MISTAKES = (ValueError, TypeError, OSError, ImportError)


class Commands(Group):
    """Commands whose errors are one line each, and whose standard streams may be closed, full, or a pipe
    whose reader has left."""

    debug = False

    def list_commands(self, context) -> list[str]:
        """Return the names in the order of the panels, groups among the commands."""
        return sorted(self.commands, key=lambda name: PANELS.index(self.commands[name].rich_help_panel))

    def main(self, *arguments, standalone_mode: bool = True, **options):
        if sys.stderr is None:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open to the end, as standard error is
        try:
            with interrupts.noted():
                code = super().main(*arguments, standalone_mode=False, **options)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            code = _usage_error(error)
        if standalone_mode:
            sys.exit(code or 0)
        return code

    def make_context(self, *arguments, **options):
        with _standard_output():
            return super().make_context(*arguments, **options)

    def invoke(self, context):
        try:
            with _standard_output():
                result = super().invoke(context)
                sys.stdout.flush()
                return result
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except _MISTAKES as error:
            self._traceback()
            self._fail_if_interrupted()
            fail(_reason(error), BAD_INPUT)
        except Exception as error:
            if hasattr(error, "format_message") or isinstance(error, typer.Exit | typer.Abort):
                raise
            self._traceback()
            self._fail_if_interrupted()
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            fail(f"{reason}; `dllm --debug ...` shows where", FAILED)

    @staticmethod
    def _fail_if_interrupted() -> None:
        if interrupts.seen:
            fail("interrupted", INTERRUPTED)

    def _traceback(self) -> None:
        if self.debug:
            traceback.print_exc()


class Interrupts:
    """Whether Ctrl-C was pressed. A module that is interrupted while it is imported may answer with an error
    of its own in place of KeyboardInterrupt."""

    seen = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note interrupts within, and raise KeyboardInterrupt as ever."""
        self.seen = False
        in_main = threading.current_thread() is threading.main_thread()
        if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield  # signals are somebody else's
            return

        def note(number, frame) -> NoReturn:
            self.seen = True
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def forget(self) -> None:
        """An interrupt has been answered, and the command goes on."""
        self.seen = False


interrupts = Interrupts()


@contextmanager
def _standard_output() -> Iterator[None]:
    """Turn a failure of standard output into a one-line error; a reader that left is no error."""
    if sys.stdout is None:
        fail("standard output is closed", FAILED)
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(READER_LEFT) from None  # as if SIGPIPE had ended it
        fail(f"standard output cannot be written: {error.strerror}", FAILED)


def _reason(error: Exception) -> str:
    """Return an error as one says it: a file and what is wrong with it, without the number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def fail(reason: object, code: int = BAD_INPUT) -> NoReturn:
    """Print a one-line error and end the command."""
    from rich.console import Console

    line = harmless(f"dllm: {' '.join(str(reason).split())}")
    Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _usage_error(error) -> int:
    """Print what is wrong with the command line, and where its help is; return the exit code."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        return BAD_INPUT  # the help has been printed already
    where = "dllm" if context is None else context.command_path
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    try:
        fail(f"{message}; see {where} --help", error.exit_code)
    except typer.Exit as ended:
        return ended.exit_code


app = typer.Typer(
    cls=Commands,
    help="Sample from, train and measure diffusion language models.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted, 141 the reader of the output left.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.command.debug = debug
    sys.stdout.reconfigure(errors="backslashreplace")
