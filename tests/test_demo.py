"""`make demo` shows what is true of the embedded model, in text that reads well."""

from collections import Counter

import pytest
from typer.testing import CliRunner

from dllm_kernels import demo
from dllm_kernels.cli import app
from dllm_train.recipes.tiny_python import arithmetic


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """The texts of the demo, each with its table, in order."""
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.output
    return result.stdout.split(" \u2500\u2500\u2500")[1:]


def rows(part: str) -> dict[str, list[str]]:
    """The table of one text: the cells after each row's name."""
    lines = part.split("same text")[1].splitlines()
    names = ("dllm_kernels", "plain loop, same rule", "plain, one token/step")
    return {name: line.split(name)[1].split() for name in names for line in lines if name in line}


def test_no_line_is_repeated_more_than_twice(shown):
    for part in shown:
        text = part.splitlines()[1:]
        text = text[: next(i for i, line in enumerate(text) if "same text" in line)]
        assert max(Counter(line for line in text if line.strip()).values()) <= 2


def test_the_sums_are_right_and_take_fewer_forwards_than_tokens(shown):
    sums = shown[0]
    assert all(f"assert {a} + {b} == {a + b}\n" in sums for a, b in demo.ADDITIONS)
    assert float(rows(sums)["dllm_kernels"][2]) > 4


def test_the_sums_were_held_out_of_training():
    assert all(arithmetic.is_held_out(*pair) for pair in demo.ADDITIONS)


def test_every_text_equals_that_of_the_plain_loop_with_the_same_rule(shown):
    assert len(shown) == 3
    for part in shown:
        table = rows(part)
        assert len(table) == 3
        assert table["plain loop, same rule"][-1] == "yes"
        assert table["plain loop, same rule"][1] == table["dllm_kernels"][1]


def test_a_line_of_the_demo_fits_a_terminal_of_80_columns(shown):
    assert all(len(line.rstrip()) <= 80 for part in shown for line in part.splitlines())
