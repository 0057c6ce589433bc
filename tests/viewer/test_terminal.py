"""The live view: the look of each kind of token, and no drawing without a terminal."""

from dataclasses import dataclass
from io import StringIO

import pytest
import torch
from rich.console import Console

from dllm_kernels.viewer.terminal import MASK_CELL, STYLES, TerminalView, canvas_text
from tests.sampling.tokenizer_zoo import tokenizer_of

MASK = 99


class Letters:
    """Token 0 is a, 1 is b, ..."""

    @staticmethod
    def decode(ids):
        return "".join(chr(ord("a") + token) for token in ids)


@dataclass
class Event:
    canvas: torch.Tensor
    fresh: list[int]
    forwards: int = 3

    def positions_of(self, row):
        assert row == 0
        return self.fresh


def test_masks_are_cells_and_each_kind_has_its_style():
    text = canvas_text([0, 1, 2, MASK, MASK], Letters, MASK, fresh={2}, filled={1, 2})
    assert text.plain == "abc" + 2 * MASK_CELL
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles == {"b": STYLES["filled"], "c": STYLES["fresh"], 2 * MASK_CELL: STYLES["mask"]}


def test_a_terminal_sees_every_round():
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=60)
    with TerminalView(Letters, MASK, title="letters", console=console) as view:
        view(Event(torch.tensor([[0, MASK]]), []))
        view(Event(torch.tensor([[0, 1]]), [1]))
    assert MASK_CELL in screen.getvalue() and "1 tokens" in screen.getvalue()


def test_words_keep_the_spaces_between_runs_of_one_style():
    """Decoded alone, the first word of a run has no space before it in SentencePiece tokenizers."""
    tokenizer = tokenizer_of("Llama")
    mask = tokenizer.mask_token_id
    the, cat, sat = tokenizer.convert_tokens_to_ids(["▁the", "▁cat", "▁sat"])
    text = canvas_text([the, cat, mask, sat], tokenizer, mask, fresh={1}, filled={1, 3})
    assert text.plain == f"the cat{MASK_CELL} sat"


def test_a_tokenizer_that_is_not_one_of_transformers_is_refused():
    with pytest.raises(TypeError, match=r"tokenizer is a tokenizers.Tokenizer; give a tokenizer of transf"):
        TerminalView(tokenizer_of("Llama").backend_tokenizer, MASK)


def test_nothing_is_drawn_without_a_terminal():
    screen = StringIO()
    with TerminalView(Letters, MASK, console=Console(file=screen)) as view:
        view(Event(torch.tensor([[0, MASK]]), []))
    assert screen.getvalue() == ""
