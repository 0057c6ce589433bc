"""A live picture of one canvas in the terminal: masks fill in where tokens are committed, figures below."""

from __future__ import annotations

import os
import termios
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import IO

import torch
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.style import Style
from rich.text import Text

from dllm_kernels.models.text import check_tokenizer, decoded_behind
from dllm_kernels.viewer import COLOURS
from dllm_kernels.viewer.control_characters import harmless

MASK_CELL, SPECIAL_CELL, BORDER = "░", "·", "│"
STYLES = {"given": "", "fresh": "bold green", "filled": "cyan", "mask": "dim", "border": "dim"}
_EARLY_TO_LATE = ((86, 110, 214), (52, 152, 196), (46, 160, 110), (186, 140, 30))
_UNSURE_TO_SURE = ((205, 70, 60), (200, 140, 40), (60, 160, 80))
_SECONDS_PER_FRAME = 1 / 30
_SHARE_OF_TIME = 0.2  # that drawing may take of a run
_NARROW = 40  # columns below which there is no frame around the text
_TAB = "    "


class TerminalView:
    """Show row 0 of a running `dk.sample` or `dk.infill`: pass the view as `on_round`.

    with TerminalView(tokenizer, mask_id, title="def fib(n):") as view:
        dk.sample(model, prompt, tokenizer=tokenizer, on_round=view)

    colour: "step", from the first commits to the latest, or "confidence", by the probability that a token was
    committed with. block_size: marks where blocks end; origin: the position that they count from, None: the
    first mask. start: the first position to show. The view waits `pause` seconds after every round, so that
    the eye can follow a small model. It draws nothing if the console is not a terminal that can be drawn on:
    the caller prints the finished text. A canvas of more lines than the terminal is scrolled to the active
    block.
    """

    def __init__(
        self,
        tokenizer,
        mask_id: int,
        *,
        title: str = "",
        pause: float = 0.0,
        console: Console | None = None,
        colour: str = "step",
        block_size: int | None = None,
        origin: int | None = 0,
        start: int = 0,
    ):
        check_tokenizer(tokenizer)
        if colour not in COLOURS:
            raise ValueError(f"colour is {colour!r}; allowed: {', '.join(COLOURS)}")
        self.tokenizer, self.mask_id, self.title, self.pause = tokenizer, mask_id, title, pause
        self.console = console or Console()
        self.colour, self.block_size, self.origin, self.start = colour, block_size, origin, start
        self.step_of: dict[int, int] = {}
        self.probability_of: dict[int, float] = {}
        self.rounds, self.next_drawing, self.paused = 0, 0.0, 0.0
        self.pieces = _Pieces(tokenizer.decode, {*getattr(tokenizer, "all_special_ids", ())})
        self.live, self.width = self._live(), 0
        self.draws = self.console.is_terminal and not self.console.is_dumb_terminal

    def __enter__(self) -> TerminalView:
        self.started = time.perf_counter()
        if self.draws:
            self.echo = _Echo(self.console.file)
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.draws:
            self.live.stop()
            self.echo.restore()

    def __call__(self, event) -> None:
        """Draw one round (`dllm_kernels.sampling.loop.Round`)."""
        if not self.draws:
            return
        fresh = self._note(event)
        now = time.perf_counter()
        if self.pause or now >= self.next_drawing:
            canvas = event.canvas[0].tolist()
            seconds = now - self.started - self.paused
            self._resized()
            self.live.update(self.picture(canvas, fresh, event.forwards, seconds), refresh=True)
            drawn = time.perf_counter()
            self.next_drawing = drawn + max(_SECONDS_PER_FRAME, (drawn - now) * (1 / _SHARE_OF_TIME - 1))
        if self.pause:
            time.sleep(self.pause)
            self.paused += self.pause

    def _live(self) -> Live:
        return Live(console=self.console, auto_refresh=False, transient=True, vertical_overflow="crop")

    def _resized(self) -> None:
        """Begin anew on an empty screen if lines have another width: those that stand were broken by it."""
        width, height = self.console.size
        if self.width not in (0, width):
            self.live.stop()
            self.console.print("\n" * height, end="")
            self.console.control(Control.home())
            self.live = self._live()
            self.live.start()
        self.width = width

    def _note(self, event) -> list[int]:
        """Keep what a round committed in row 0; return its positions."""
        fresh = event.positions_of(0)
        probabilities = event.probabilities[event.rows == 0].tolist()
        self.probability_of.update(zip(fresh, probabilities, strict=True))
        self.step_of.update(dict.fromkeys(fresh, self.rounds))
        self.rounds += 1
        if self.origin is None:
            masks = (event.canvas[0] == self.mask_id).nonzero()[:, 0].tolist()
            self.origin = min([*fresh, *masks], default=0)
        return fresh

    def picture(self, canvas: list[int], fresh: list[int], forwards: int, seconds: float) -> RenderableType:
        """Return what is drawn of a canvas in a terminal of the console's size."""
        width, height = self.console.size
        framed = width >= _NARROW
        inside = width - 4 if framed else width
        room = max(height - (4 if framed else 2), 1)
        masks = (at for at, token in enumerate(canvas) if token == self.mask_id)
        active = max(min(fresh, default=next(masks, 0)) - self.start, 0)
        text, offsets = self._text(canvas, set(fresh))
        lines, first_of = folded(text, inside)
        top = _scrolled(first_of(offsets[active]) if offsets else 0, len(lines), room)
        shown = Text("\n", no_wrap=True, overflow="crop").join(lines[top : top + room])
        figures = Text(
            self.figures(len(self.step_of), forwards, seconds, inside), style="dim", justify="right"
        )
        if not framed:
            return Group(shown, figures)
        title = Text(harmless(self.title).replace("\n", " "), no_wrap=True, overflow="ellipsis")
        scrolled = f"lines {top + 1}-{top + len(lines[top : top + room])} of {len(lines)}"
        return Panel(
            Group(shown, figures),
            title=title if self.title else None,
            title_align="left",
            subtitle=scrolled if len(lines) > room else None,
            subtitle_align="right",
        )

    @staticmethod
    def figures(tokens: int, forwards: int, seconds: float, width: int) -> str:
        """Return the status line, as much of it as `width` columns hold."""
        rate, share = tokens / max(seconds, 1e-9), tokens / max(forwards, 1)
        lines = (
            f"{tokens} tokens   {rate:.0f} tokens/s   {forwards} forwards   {share:.2f} tokens per forward   "
            f"{seconds:.1f} s",
            f"{tokens} tokens  {rate:.0f}/s  {forwards} forwards  {share:.2f} per forward",
            f"{tokens} tok  {rate:.0f}/s  {share:.2f}/fwd",
            f"{rate:.0f}/s {share:.2f}/fwd",
            f"{rate:.0f}/s",
        )
        return next((line for line in lines if len(line) <= width), "")

    def _text(self, canvas: list[int], fresh: set[int]) -> tuple[Text, list[int]]:
        """Return what is shown of the canvas as styled text, and where in it each position begins."""
        styles = {at: self._style(at, at in fresh) for at in self.step_of}
        borders = ()
        if self.block_size and self.step_of:
            origin, size = self.origin or 0, self.block_size
            first = min(self.step_of)
            borders = range(origin + (first - origin) // size * size, len(canvas), size)
        pieces = self.pieces.of(canvas, self.mask_id)
        start = self.start
        styles = {at - start: style for at, style in styles.items()}
        borders = {at - start for at in borders if at > start}
        return _styled(canvas[start:], pieces[start:], styles, self.mask_id, borders)

    def _style(self, position: int, fresh: bool) -> Style:
        if self.colour == "confidence":
            colour = _ramp(_UNSURE_TO_SURE, self.probability_of[position])
        else:
            colour = _ramp(_EARLY_TO_LATE, self.step_of[position] / max(self.rounds - 1, 1))
        return Style(color=colour, bold=fresh, underline=fresh)


class _Echo:
    """The echo of keys on a terminal, turned off: what is typed, ^C too, would move the picture."""

    def __init__(self, file: IO[str]):
        self.descriptor: int | None = None
        try:
            descriptor = file.fileno()
            if os.tcgetpgrp(descriptor) != os.getpgrp():
                return  # in the background, where changing the terminal would stop the process
            self.before = termios.tcgetattr(descriptor)
            without = [*self.before]
            without[3] &= ~termios.ECHO
            termios.tcsetattr(descriptor, termios.TCSANOW, without)
            self.descriptor = descriptor
        except (OSError, ValueError, termios.error):
            return  # not a terminal of its own

    def restore(self) -> None:
        if self.descriptor is not None:
            termios.tcsetattr(self.descriptor, termios.TCSANOW, self.before)


def canvas_text(
    canvas: list[int] | torch.Tensor, tokenizer, mask_id: int, fresh: set[int], filled: set[int]
) -> Text:
    """Return the canvas as styled text: one cell per mask, given text plain, tokens of this round in bold."""
    canvas = [int(token) for token in canvas]
    kinds = {at: "fresh" if at in fresh else "filled" for at in filled | fresh}
    styles = {at: Style.parse(STYLES[kind]) for at, kind in kinds.items()}
    return _styled(canvas, _Pieces(tokenizer.decode).of(canvas, mask_id), styles, mask_id, ())[0]


def folded(text: Text, width: int) -> tuple[list[Text], Callable[[int], int]]:
    """Cut a text into lines of at most `width` cells. Return them, and a function from a place in the text to
    the number of its line."""
    cuts, column = [], 0
    for place, character in enumerate(text.plain):
        if character == "\n":
            column = 0
            cuts.append(place + 1)
            continue
        cells = cell_len(character)
        if column + cells > width and column:
            cuts.append(place)
            column = 0
        column += cells
    lines = list(text.divide(cuts)) if cuts else [text.copy()]
    for line in lines:
        if line.plain.endswith("\n"):
            line.right_crop(1)
        line.no_wrap, line.overflow = True, "crop"
    return lines, lambda place: sum(cut <= place for cut in cuts)


def _styled(
    canvas: list[int],
    pieces: Iterable[str],
    styles: Mapping[int, Style],
    mask_id: int,
    borders: Collection[int],
) -> tuple[Text, list[int]]:
    """Return the text of `pieces`, one per position, and where in it each begins."""
    text, offsets = Text(overflow="fold"), []
    mask = Style.parse(STYLES["mask"])
    for at, (token, piece) in enumerate(zip(canvas, pieces, strict=True)):
        if at in borders:
            text.append(BORDER, style=STYLES["border"])
        offsets.append(len(text))
        text.append(piece, style=mask if token == mask_id else styles.get(at))
    return text, offsets


class _Pieces:
    """The text of each token of a canvas, which is only read again where it or what stands before changed.

    A token is decoded behind those before it, which determine whether a space separates the two. Where tokens
    share a character, it belongs to the last of them. special: tokens that are a cell each, as end tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], special: Collection[int] = ()):
        self.decode, self.special = decode, special
        self.known: dict[tuple[int, ...], str] = {}

    def of(self, canvas: list[int], mask_id: int) -> list[str]:
        pieces, before, open_at = [], [], None
        for at, token in enumerate(canvas):
            if token == mask_id or token in self.special:
                if open_at is not None:
                    before += canvas[open_at:at]
                    open_at = None
                pieces.append(MASK_CELL if token == mask_id else SPECIAL_CELL)
                continue
            start = at if open_at is None else open_at
            group = canvas[start : at + 1]
            piece = self._read(before, group)
            ends = at + 1 == len(canvas) or canvas[at + 1] == mask_id or canvas[at + 1] in self.special
            if piece.endswith("\ufffd") and not ends and len(group) < _LONGEST_CHARACTER:
                pieces.append("")
                open_at = start
                continue
            pieces.append(harmless(piece).replace("\t", _TAB))
            before += group
            open_at = None
        return pieces

    def _read(self, before: list[int], group: list[int]) -> str:
        key = (*before[-_CONTEXT:], -1, *group)
        if key not in self.known:
            self.known[key] = decoded_behind(self.decode, before, group)
        return self.known[key]


_LONGEST_CHARACTER = 8  # tokens: no character has more bytes
_CONTEXT = 4  # tokens before one that its spelling is remembered by


def _ramp(stops: tuple[tuple[int, int, int], ...], share: float) -> Color:
    """Return the colour at `share` (0 to 1) of the way from the first stop to the last."""
    at = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    left = min(int(at), len(stops) - 2)
    return Color.from_rgb(
        *(a + (b - a) * (at - left) for a, b in zip(stops[left], stops[left + 1], strict=True))
    )


def _scrolled(line: int, lines: int, room: int) -> int:
    """Return the first line to show, so that `line` is a third of the way down where there are too many."""
    return min(max(line - room // 3, 0), max(lines - room, 0))
