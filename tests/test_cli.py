"""The commands that generate, on the embedded model: where text and figures go, and errors of one line."""

import pytest
from typer.testing import CliRunner

from dllm_kernels.cli import app

PROMPT = "def add(a, b):\n"
GAPPED = "def add(a, b):\n    return<mask:4>\n\nprint(add(1, 2))\n"


def run(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(arguments), input=stdin)


def test_sample_continues_the_prompt():
    result = run("sample", PROMPT, "--max-new-tokens", "16")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(PROMPT) and len(result.stdout) > len(PROMPT) + 1
    assert "tokens per forward" in result.stderr


def test_sample_reads_standard_input():
    piped = run("sample", "-", "--max-new-tokens", "16", stdin=PROMPT)
    assert piped.stdout == run("sample", PROMPT, "--max-new-tokens", "16").stdout


def test_infill_keeps_what_is_given_and_fills_the_gap(tmp_path):
    file = tmp_path / "gapped.py"
    file.write_text(GAPPED)
    result = run("infill", str(file))
    assert result.exit_code == 0, result.stderr
    before, after = GAPPED.split("<mask:4>")
    assert result.stdout.startswith(before) and result.stdout.endswith(after + "\n")
    assert "mask" not in result.stdout
    assert result.stdout == run("infill", "-", stdin=GAPPED).stdout


def test_steps_bound_the_forwards():
    result = run("infill", "-", "--steps", "2", stdin=GAPPED)
    assert result.exit_code == 0 and "2 forwards" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["sample", PROMPT, "--threshold", "0.9", "--steps", "4"], "not both"),
        (["sample", PROMPT, "--model", "no-such-model"], "no-such-model"),
        (["sample", PROMPT, "--max-new-tokens", "0"], "max_new_tokens"),
        (["sample", PROMPT, "--cache", "warm"], "cache"),
        (["sample", ""], "empty"),
        (["infill", "no-such-file.py"], "no-such-file.py"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, reason):
    result = run(*arguments)
    assert result.exit_code == 2
    assert reason in result.stderr and "Traceback" not in result.stderr


def test_demo_shows_both_ways_of_generating():
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("plain loop, same rule") == 2
    assert "tokens/forward" in result.stdout
