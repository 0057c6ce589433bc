"""`dllm chat`: a conversation on the terminal, or over pipes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dllm_kernels.cli.commands import GENERATE, interrupts
from dllm_kernels.cli.models import Attention, Device, Dtype, Model, Weights, load
from dllm_kernels.cli.options import Sampling, given_options, with_rule
from dllm_kernels.cli.partial import Partial
from dllm_kernels.cli.sample import Colour, Pause, Preset, View, live_view, mask_id_of
from dllm_kernels.cli.streams import check_writable, write_text
from dllm_kernels.viewer.control_characters import harmless

_CHAT = """Talk with a model. A model without a chat template continues each input instead.

\b
[bold]Examples[/bold]
  dllm chat --model DIR
  dllm chat --model DIR --history talk.json --system "Answer in one sentence."
  dllm chat --max-new-tokens 32 --threshold 0.8
  echo "def add(a, b):" | dllm chat
"""
HELP = """/set NAME VALUE   set an option, such as /set threshold 0.8; /set alone lists those that are set
/undo             take back the last input and its reply
/infill TEXT      fill the gaps of a text, written as <mask:8>; without TEXT the next input is the text
/clear            begin a new conversation
/save FILE        write the conversation to a file, which --history FILE goes on with
/help             this list
/quit             end, as Ctrl-D does; Ctrl-C stops a reply
A line of \"\"\" begins a text of several lines, and another one ends it."""
_FENCE = '"""'


class Chatting(Sampling):
    """Options of a conversation; `--history` is its file."""

    left_out = frozenset({"chat", "history", "max_batch"})


def add_to(app: typer.Typer) -> None:
    app.command(cls=Chatting, rich_help_panel=GENERATE, help=_CHAT, short_help="Talk with a model.")(chat)


def chat(
    context: typer.Context,
    model: Model = "tiny-python",
    attention: Attention = None,
    device: Device = None,
    dtype: Dtype = None,
    weights: Weights = None,
    preset: Preset = None,
    history: Annotated[
        Path | None, typer.Option(help="A file to go on with, and to write after every turn.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first input.")] = None,
    view: View = True,
    colour: Colour = "step",
    pause: Pause = 0.0,
) -> None:
    options = given_options(context)
    with_rule(options, preset)
    if history is not None:
        check_writable(history.resolve())
    loaded, tokenizer = load(model, attention, device, dtype, weights)
    from dllm_kernels.cli.conversation import Conversation

    conversation = Conversation(loaded, tokenizer, model, options, preset)
    if history is not None and history.exists():
        conversation.load(history)
    if system is not None:
        conversation.messages = [one for one in conversation.messages if one["role"] != "system"]
        conversation.messages.insert(0, {"role": "system", "content": system})
    infiller = partial(load, model, attention, device, dtype, weights, infills=True)
    Chat(conversation, history, infiller, view, colour, pause).run()


class Chat:
    """Reads inputs and prints replies until the inputs end.

    infiller: returns the model and tokenizer that fill gaps.
    """

    def __init__(
        self, conversation, history: Path | None, infiller: Callable, view: bool, colour: str, pause: float
    ):
        from rich.console import Console

        self.conversation, self.history, self.infiller = conversation, history, infiller
        self.view, self.colour, self.pause = view, colour, pause
        self.infilling: tuple | None = None
        self.console = Console(stderr=True)
        self.inputs = Inputs()
        self.commands = {
            "/set": self.set, "/undo": self.undo, "/infill": self.infill, "/clear": self.clear,
            "/save": self.save, "/help": lambda _: self.say(HELP),
        }  # fmt: skip

    def run(self) -> None:
        conversation = self.conversation
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        if not conversation.templated:
            self.say(f"{conversation.name} has no chat template: it continues what you write. /help, /quit")
        elif self.inputs.typed:
            self.say(f"{conversation.name}. /help lists what begins with a slash, /quit ends")
        if self.history is not None and conversation.exchanges:
            self.say(f"{conversation.exchanges} turns from {self.history}")
        while True:
            try:
                text = self.inputs.next()
            except KeyboardInterrupt:
                if not self.inputs.typed:
                    raise
                interrupts.forget()
                self.say("")
                continue
            if text is None or text.strip() in ("/quit", "/exit"):
                break
            if not text.strip():
                continue
            try:
                self.take(text)
            except KeyboardInterrupt:
                if not self.inputs.typed:
                    raise
                interrupts.forget()
                conversation.forget_unanswered()
                self.say("stopped")
            except typer.Exit:  # a file that could not be written, which has been told
                if not self.inputs.typed:
                    raise
            except (ValueError, TypeError, OSError) as error:
                if not self.inputs.typed or (isinstance(error, OSError) and error.filename is None):
                    raise  # of a script, or of standard output
                self.mistake(error)

    def take(self, text: str) -> None:
        """Do what an input asks for."""
        if not text.startswith("/"):
            self.reply(text)
            return
        name, _, argument = text.partition(" ")
        if name not in self.commands:
            known = ", ".join([*self.commands, "/quit"])
            raise ValueError(f"{name} is not a command; there are {known}. A space before it makes it a text")
        self.commands[name](argument.strip())

    # ---- commands ----------------------------------------------------------------------------------------
    def reply(self, text: str) -> None:
        """Continue the conversation; a reply that is stopped is kept as far as it stands."""
        conversation = self.conversation
        conversation.ask(text)
        mask_id = mask_id_of(conversation.model, conversation.tokenizer, conversation.options)
        reply, start = Partial(conversation.tokenizer, mask_id), time.perf_counter()
        paused = 0.0
        with ExitStack() as drawing:

            def prepared(ids: list[int]):
                reply.start = len(ids)
                view = self.drawn("sample", conversation.model, conversation.tokenizer, start=len(ids))
                if view is None:
                    return reply
                drawing.enter_context(view)

                def seen(event) -> None:
                    nonlocal paused
                    reply(event)
                    view(event)
                    paused = view.paused

                return seen

            try:
                output = conversation.sample(prepared)
                said = output.texts[0]
            except KeyboardInterrupt:
                if not self.inputs.typed:
                    raise
                interrupts.forget()
                output, said = None, reply.text()
            except BaseException:
                conversation.forget_unanswered()
                raise
        conversation.answer(said)
        write_text(said if said.endswith("\n") or sys.stdout.isatty() else f"{said}\n")
        self.figures(output, time.perf_counter() - start - paused)
        if self.history is not None:
            conversation.save(self.history)

    def figures(self, output, seconds: float) -> None:
        """Tell what a reply took."""
        dropped = self.conversation.dropped
        if dropped:
            self.say(f"the model has no room for the first {dropped} messages any more")
        if output is None:
            self.say("stopped; /undo takes it back")
        elif self.inputs.typed:
            tokens = int(output.lengths[0])
            self.say(
                f"{tokens} tokens, {tokens / seconds:.0f} tokens/s, {output.forwards} forwards, "
                f"{self.conversation.reused} positions reused"
            )

    def set(self, argument: str) -> None:
        if argument:
            self.conversation.set(argument)
        shown = with_rule(self.conversation.options, self.conversation.preset)
        shown.pop("config", None)
        parts = [f"preset={self.conversation.preset}"] if self.conversation.preset else []
        self.say("  ".join([*parts, *(f"{name}={value}" for name, value in shown.items())]))

    def undo(self, _: str) -> None:
        asked = self.conversation.undo()
        if asked is None:
            raise ValueError("there is nothing to take back")
        if self.history is not None:
            self.conversation.save(self.history)
        self.say(f"took back: {' '.join(asked['content'].split())[:60]}")

    def clear(self, _: str) -> None:
        conversation = self.conversation
        conversation.messages = [one for one in conversation.messages if one["role"] == "system"]
        if self.history is not None:
            conversation.save(self.history)
        self.say("a new conversation")

    def save(self, argument: str) -> None:
        target = Path(argument).expanduser() if argument else self.history
        if target is None:
            raise ValueError("give a file, such as /save talk.json")
        check_writable(target.resolve())
        self.conversation.save(target)
        self.say(f"written to {target}")

    def infill(self, argument: str) -> None:
        import dllm_kernels as dk

        text = argument or self.inputs.next()
        if text is None:
            return
        if "<mask" not in text:
            raise ValueError("the text has no gap; write <mask:8> where 8 tokens are to come")
        if self.infilling is None:
            self.infilling = self.infiller()
        model, tokenizer = self.infilling
        options = with_rule(self.conversation.options, self.conversation.preset)
        for name in ("max_new_tokens", "stop_on_eos"):
            options.pop(name, None)
        view = self.drawn("infill", model, tokenizer)
        with view or nullcontext():
            output = dk.infill(model, text, tokenizer=tokenizer, on_round=view, **options)
        write_text(output.texts[0] + ("" if output.texts[0].endswith("\n") else "\n"))

    # ---- what is seen beside the replies -----------------------------------------------------------------
    def drawn(self, operation: str, model, tokenizer, start: int = 0):
        """Return the view of a run; None where nobody looks."""
        if not (self.view and self.inputs.typed):
            return None
        options = self.conversation.options
        return live_view(
            operation, model, tokenizer, options, self.console, self.colour, self.pause, start=start
        )

    def say(self, line: str) -> None:
        self.console.print(harmless(line), style="dim", soft_wrap=True, markup=False, highlight=False)

    def mistake(self, error: Exception) -> None:
        line = " ".join(str(error).split())
        self.console.print(harmless(line), style="red", soft_wrap=True, markup=False, highlight=False)


class Inputs:
    """What the user writes: lines, or texts of several lines between lines of triple quotes."""

    def __init__(self) -> None:
        self.typed = sys.stdin is not None and sys.stdin.isatty()
        if self.typed:
            with suppress(ImportError):
                import readline  # noqa: F401 - line editing in input()

    def next(self) -> str | None:
        """Return the next input; None at the end. ValueError for bytes that are no text."""
        line = self._line("> ")
        if line is None or line.strip() != _FENCE:
            return line
        lines = []
        while (line := self._line(". ")) is not None and line.strip() != _FENCE:
            lines.append(line)
        return "\n".join(lines)

    def _line(self, prompt: str) -> str | None:
        if self.typed:
            sys.stdout.flush()
            try:
                return input(prompt)
            except EOFError:
                print(file=sys.stderr)
                return None
        data = sys.stdin.buffer.readline()
        if not data:
            return None
        try:
            return data.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(f"standard input is not UTF-8: byte 0x{byte:02x} in a line") from None
