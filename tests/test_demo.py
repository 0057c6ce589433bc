"""`make demo` shows what is true of the embedded model, in text that reads well.

If the model changes: `python tools/pick_gaps.py` prints another FILE for dllm_kernels/demo.py; its GAPS are
those where the second and the third test below hold.
"""

import ast
import re

import pytest
from typer.testing import CliRunner

from dllm_kernels import demo
from dllm_kernels.cli import app
from dllm_train.recipes.tiny_python import arithmetic


@pytest.fixture(scope="module")
def result():
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def parts(result) -> list[str]:
    """The parts of the demo: what it writes, adds, fills and compares."""
    titles = re.compile(r"^(?:writing|adding|filling|the same) .*\u2500$", re.MULTILINE)
    parts = titles.split(result.stdout)[1:]
    assert len(parts) == 4
    return parts


def unmarked(text: str) -> str:
    return demo.HIDDEN.sub("", text)


def shown(part: str) -> str:
    """The text of a part without the margin and what is told below it."""
    lines = part.partition("tokens committed")[0].strip("\n").splitlines()
    return "".join(f"{line[2:].rstrip()}\n" for line in lines if line.strip() or lines).rstrip() + "\n"


def test_the_file_is_python_and_comes_back_as_it_was(parts):
    source = unmarked(demo.FILE)
    ast.parse(source)
    assert shown(parts[0]) == source


def test_a_gap_is_right_when_the_text_after_it_is_seen(parts):
    for text in demo.GAPS:
        line = unmarked(text).splitlines()[0]
        assert len(re.findall(rf"{re.escape(line)} *$", parts[2], re.MULTILINE)) == 1


def test_a_gap_is_wrong_when_the_text_after_it_is_not_seen(parts):
    for text in demo.GAPS:
        line, start = unmarked(text).splitlines()[0], text.partition("⟦")[0]
        (guessed,) = re.findall(rf"^  {re.escape(start)}.*?(?=  )", parts[2], re.MULTILINE)
        assert guessed.strip() != line


def test_the_sums_are_right(parts):
    assert shown(parts[1]) == unmarked(demo.SHEET)
    assert all(f" + {b} == {a + b}\n" in unmarked(demo.SHEET) for a, b in demo.ADDITIONS)


def test_the_sums_were_held_out_of_training():
    assert all(arithmetic.is_held_out(*pair) for pair in demo.ADDITIONS)


def test_most_of_the_file_is_hidden(parts):
    hidden = sum(map(len, demo.HIDDEN.split(demo.FILE)[1::2]))
    assert hidden > len(unmarked(demo.FILE)) / 3


@pytest.mark.parametrize("part, least", [(0, 2), (1, 4)])
def test_a_forward_commits_several_tokens(parts, part, least):
    counts = list(map(int, parts[part].partition("by each forward:")[2].split()))
    assert sum(counts) / len(counts) >= least


def test_every_loop_gives_the_same_text(parts):
    rows = re.findall(
        r"^    (LLaDA's loop|LLaDA's loop, \S+ \S+|dllm_kernels) +(\d+) .*× +(\w+)", parts[3], re.M
    )
    assert len(rows) == 6
    assert {equal for *_, equal in rows} == {"yes"}
    for _, threshold, ours in (rows[:3], rows[3:]):
        assert threshold[1] == ours[1]


def test_a_line_of_the_demo_fits_a_terminal_of_80_columns(result):
    assert all(len(line.rstrip()) <= 80 for line in result.stdout.splitlines())


def test_nothing_warns(result):
    assert result.stderr == ""
