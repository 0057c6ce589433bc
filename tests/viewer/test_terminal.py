"""The live view: the look of each kind of token, where it scrolls, and no drawing without a terminal."""

from dataclasses import dataclass
from io import StringIO

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style

from dllm_kernels.viewer.control_characters import harmless
from dllm_kernels.viewer.terminal import (
    BORDER,
    MASK_CELL,
    SPECIAL_CELL,
    STYLES,
    TerminalView,
    canvas_text,
    folded,
)
from tests.sampling.tokenizer_zoo import tokenizer_of

MASK = 99


class Letters:
    """Token 0 is a, 1 is b, ...; 50 is a line end, 51 clears the screen, 52 is wide."""

    @staticmethod
    def decode(ids):
        spelled = {50: "\n", 51: "\x1b[2J", 52: "字"}
        return "".join(spelled.get(token) or chr(ord("a") + token) for token in ids)

    def __call__(self, text):
        return [ord(letter) - ord("a") for letter in text]


@dataclass
class Event:
    canvas: torch.Tensor
    fresh: list[int]
    forwards: int = 3
    confidence: float = 0.5

    def __post_init__(self):
        self.rows = torch.zeros(len(self.fresh), dtype=torch.int64)
        self.probabilities = torch.full((len(self.fresh),), self.confidence)

    def positions_of(self, row):
        assert row == 0
        return self.fresh


def screen(width=60, height=25, **options):
    return Console(
        file=StringIO(), force_terminal=True, width=width, height=height, color_system="truecolor", **options
    )


def drawn(picture, console) -> list[str]:
    """The lines of a picture, as the console lays them out."""
    with console.capture() as captured:
        console.print(picture, end="")
    return [line for line in captured.get().splitlines()]


def plain(width, height) -> Console:
    return Console(file=StringIO(), width=width, height=height, no_color=True)


def view_of(canvas, console, **options):
    view = TerminalView(Letters(), MASK, console=console, **options)
    view.started = 0.0
    return view, view.picture(canvas, [], 3, 1.0)


def test_masks_are_cells_and_each_kind_has_its_style():
    text = canvas_text([0, 1, 2, MASK, MASK], Letters(), MASK, fresh={2}, filled={1, 2})
    assert text.plain == "abc" + 2 * MASK_CELL
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    kinds = {"b": "filled", "c": "fresh", MASK_CELL: "mask"}
    assert styles == {letter: Style.parse(STYLES[kind]) for letter, kind in kinds.items()}


def test_a_terminal_sees_every_round():
    console = screen()
    with TerminalView(Letters(), MASK, title="letters", console=console, pause=1e-3) as view:
        view(Event(torch.tensor([[0, MASK]]), []))
        view(Event(torch.tensor([[0, 1]]), [1]))
    seen = console.file.getvalue()
    assert MASK_CELL in seen and "1 tokens" in seen and "letters" in seen


def test_words_keep_the_spaces_between_runs_of_one_style():
    """Decoded alone, the first word of a run has no space before it in SentencePiece tokenizers."""
    tokenizer = tokenizer_of("Llama")
    mask = tokenizer.mask_token_id
    the, cat, sat = tokenizer.convert_tokens_to_ids(["▁the", "▁cat", "▁sat"])
    text = canvas_text([the, cat, mask, sat], tokenizer, mask, fresh={1}, filled={1, 3})
    assert text.plain == f"the cat{MASK_CELL} sat"


def test_a_character_of_several_tokens_is_shown_once_it_is_whole():
    class Bytes:
        decode = staticmethod(lambda ids: bytes(ids).decode(errors="replace"))

    euro = [*"€".encode()]
    assert canvas_text([65, *euro, 66], Bytes, MASK, fresh=set(), filled=set()).plain == "A€B"
    assert "€" not in canvas_text([65, *euro[:2], MASK], Bytes, MASK, fresh=set(), filled=set()).plain


def test_a_tokenizer_that_is_not_one_of_transformers_is_refused():
    with pytest.raises(TypeError, match=r"tokenizer is a tokenizers.Tokenizer; give a tokenizer of transf"):
        TerminalView(tokenizer_of("Llama").backend_tokenizer, MASK)


def test_another_colour_is_refused():
    with pytest.raises(ValueError, match="colour is 'age'; allowed: step, confidence"):
        TerminalView(Letters(), MASK, colour="age")


@pytest.mark.parametrize("kind", ["file", "dumb"])
def test_nothing_is_drawn_without_a_terminal(kind, monkeypatch):
    monkeypatch.setattr(Console, "_environ", {"TERM": "dumb" if kind == "dumb" else "xterm"})
    console = Console(file=StringIO(), force_terminal=kind == "dumb")
    with TerminalView(Letters(), MASK, console=console) as view:
        view(Event(torch.tensor([[0, MASK]]), []))
    assert console.file.getvalue() == ""


def test_no_colour_leaves_the_terminal_without_colours(monkeypatch):
    monkeypatch.setattr(
        Console, "_environ", {"NO_COLOR": "1"}
    )  # rich holds the dict that `datasets` replaces
    console = screen()
    with TerminalView(Letters(), MASK, console=console, pause=1e-3) as view:
        view(Event(torch.tensor([[0, 1]]), [1]))
    assert "38;" not in console.file.getvalue() and "ab" in console.file.getvalue().replace("\x1b[1;4m", "")


@pytest.mark.parametrize("colour", ["step", "confidence"])
def test_colours_tell_the_step_or_the_confidence(colour):
    view = TerminalView(Letters(), MASK, colour=colour, console=screen())
    for position, confidence in enumerate((0.1, 0.9, 0.1)):
        view._note(Event(torch.tensor([[0, 1, 2]]), [position], confidence=confidence))
    first, second, third = (view._style(position, False).color for position in range(3))
    assert second != first
    assert (first == third) == (colour == "confidence")


@pytest.mark.parametrize("width", [20, 33, 40, 80])
def test_every_line_fits_the_terminal(width):
    console = plain(width, 12)
    lines = drawn(view_of([*range(26), 50, 52, *[MASK] * 40], console)[1], console)
    assert len(lines) <= 12 and all(cell_len(line) <= width for line in lines)
    text = "".join(lines)
    assert "字" in text and text.count(MASK_CELL) == 40 and "/s" in text


def test_a_long_canvas_shows_the_active_block():
    console = plain(60, 10)
    canvas = [letter for line in range(50) for letter in (line % 26, 50)] + [25, MASK, 50, 24]
    lines = drawn(view_of(canvas, console)[1], console)
    assert len(lines) <= 10 and any(MASK_CELL in line for line in lines)
    assert any("of 52" in line for line in lines)


def test_blocks_have_borders_from_where_tokens_are_committed():
    view = TerminalView(Letters(), MASK, console=plain(60, 10), block_size=4, origin=0)
    view._note(Event(torch.tensor([[0] * 12]), [5]))
    text, _ = view._text([0] * 6 + [MASK] * 6, set())
    assert text.plain == f"aaaa{BORDER}aa{MASK_CELL * 2}{BORDER}{MASK_CELL * 4}"


def test_blocks_of_a_bidirectional_completion_count_from_the_first_mask():
    view = TerminalView(Letters(), MASK, console=plain(60, 10), block_size=4, origin=None)
    view._note(Event(torch.tensor([[0, 0, 0, 1, MASK, MASK, MASK, MASK]]), [3]))
    text, _ = view._text([0, 0, 0, 1, *[MASK] * 4], set())
    assert text.plain == f"aaa{BORDER}b{MASK_CELL * 3}{BORDER}{MASK_CELL}"


def test_control_characters_never_reach_the_terminal():
    console = plain(60, 10)
    lines = drawn(view_of([0, 51, 1], console, title="\x1b]0;owned\x07")[1], console)
    assert not any("\x1b" in line or "\x07" in line for line in lines)
    assert any(r"a\x1b[2Jb" in line for line in lines)


def test_special_tokens_are_a_cell_each():
    tokenizer = tokenizer_of("Llama")
    mask, end = tokenizer.mask_token_id, tokenizer.eos_token_id
    the, cat = tokenizer.convert_tokens_to_ids(["▁the", "▁cat"])
    view = TerminalView(tokenizer, mask, console=plain(60, 10))
    text, _ = view._text([the, cat, end, end, mask], set())
    assert text.plain == f"the cat{2 * SPECIAL_CELL}{MASK_CELL}"


def test_harmless_text_keeps_line_ends_and_tabs():
    assert harmless("a\tb\r\nc\n") == "a\tb\nc\n"
    assert harmless("\r\x9b\x7f\u202e\ud800") == r"\x0d\x9b\x7f\u202e\ud800"


def test_text_is_cut_into_lines_of_so_many_cells():
    text = canvas_text([0, 52, 52, 1, 50, 50, 2], Letters(), MASK, fresh=set(), filled=set())
    lines, line_of = folded(text, 3)
    assert [line.plain for line in lines] == ["a字", "字b", "", "c"]
    assert [line_of(place) for place in range(len(text))] == [0, 0, 1, 1, 1, 2, 3]
