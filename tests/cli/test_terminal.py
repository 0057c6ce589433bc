"""`dllm` in a terminal: the view of a run, narrow terminals, control characters, and Ctrl-C."""

import pytest
from rich.cells import cell_len

from dllm_kernels.cli import streams
from tests.cli.terminals import Terminal


@pytest.mark.parametrize("columns", [20, 80])
def test_a_run_is_shown_while_it_goes_on_and_leaves_the_text(columns):
    options = ("sample", "def add(a, b):", "--max-new-tokens", "24", "--pause", "0.02")
    with Terminal(*options, columns=columns, lines=12) as terminal:
        assert terminal.ended() == 0
    shown = terminal.plain
    assert "░" in shown and "/s" in shown and "Traceback" not in shown
    drawn, text = shown.rsplit("░", 1)[0], shown[shown.rindex("def add(a, b):") :]
    assert "tokens per forward" in " ".join(text.split()) and "░" not in text
    lines = [line.strip("\r") for line in drawn.split("\n")]
    assert all(cell_len(line) <= columns for line in lines if "░" in line and "\r" not in line)


def test_ctrl_c_ends_a_run_with_code_130():
    with Terminal("sample", "def add(a, b):", "--max-new-tokens", "900", "--pause", "0.1") as terminal:
        terminal.wait_for("tokens per forward")
        terminal.interrupt()
        assert terminal.ended() == 130
    shown = terminal.plain
    assert "dllm: interrupted" in shown and "Traceback" not in shown
    assert "def add(a, b):" in shown[shown.rindex("░") :], "what stands of the text is printed"


def test_a_terminal_gets_no_control_characters(monkeypatch, capfdbinary):
    monkeypatch.setattr(streams.sys.stdout, "isatty", lambda: True, raising=False)
    streams.write_text("a\x1b[2J\x9b\tb\r\nc")
    monkeypatch.undo()
    assert capfdbinary.readouterr().out == b"a\\x1b[2J\\x9b\tb\nc\n"
