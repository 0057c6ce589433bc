"""A live picture of one canvas in the terminal: masks fill in, fresh tokens stand out, figures below."""

from __future__ import annotations

import time

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from dllm_kernels.models.text import check_tokenizer, decoded_behind

MASK_CELL = "░"
STYLES = {"given": "", "fresh": "bold green", "filled": "cyan", "mask": "dim"}


class TerminalView:
    """Show row 0 of a running `dk.sample` or `dk.infill`: pass the view as `on_round`.

    with TerminalView(tokenizer, mask_id, title="def fib(n):") as view:
        dk.sample(model, prompt, tokenizer=tokenizer, on_round=view)

    The view waits `pause` seconds after every round, so that the eye can follow a small model. It draws
    nothing if the console is not a terminal: the caller prints the finished text.
    """

    def __init__(
        self, tokenizer, mask_id: int, *, title: str = "", pause: float = 0.0, console: Console | None = None
    ):
        check_tokenizer(tokenizer)
        self.tokenizer, self.mask_id, self.title, self.pause = tokenizer, mask_id, title, pause
        self.console = console or Console()
        self.filled: set[int] = set()
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> TerminalView:
        self.started = time.perf_counter()
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def __call__(self, event) -> None:
        """Draw one round (`dllm_kernels.sampling.loop.Round`)."""
        if not self.console.is_terminal:
            return
        fresh = set(event.positions_of(0))
        self.filled |= fresh
        canvas = event.canvas[0].tolist()
        seconds = time.perf_counter() - self.started
        figures = Text(
            f"{len(self.filled)} tokens   {event.forwards} forwards   {seconds:.1f} s",
            style="dim",
            justify="right",
        )
        text = canvas_text(canvas, self.tokenizer, self.mask_id, fresh, self.filled)
        self.live.update(Panel(Group(text, figures), title=self.title, title_align="left"), refresh=True)
        if self.pause:
            time.sleep(self.pause)


def canvas_text(
    canvas: list[int] | torch.Tensor, tokenizer, mask_id: int, fresh: set[int], filled: set[int]
) -> Text:
    """Return the canvas as styled text: one cell per mask, given text plain, tokens of this round in bold.

    Tokens are decoded in runs of one style, since a character may span several byte-level tokens, and after
    the text before them, which determines whether a space separates the two.
    """
    kinds = [
        "mask"
        if token == mask_id
        else "fresh"
        if position in fresh
        else "filled"
        if position in filled
        else "given"
        for position, token in enumerate(canvas)
    ]
    canvas = [int(token) for token in canvas]
    text, before = Text(overflow="fold"), []
    start = 0
    for end in range(1, len(canvas) + 1):
        if end < len(canvas) and kinds[end] == kinds[start]:
            continue
        kind = kinds[start]
        if kind == "mask":
            run = MASK_CELL * (end - start)
        else:
            run = decoded_behind(tokenizer.decode, before, canvas[start:end])
            before += canvas[start:end]
        text.append(run, style=STYLES[kind])
        start = end
    return text
