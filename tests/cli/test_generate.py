"""The commands that generate, on the embedded model: where text and figures go, and errors of one line."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dllm_kernels.cli import app

PROMPT = "def add(a, b):\n"
GAPPED = "def add(a, b):\n    return<mask:4>\n\nprint(add(1, 2))\n"


def run(*arguments: str, stdin: str | bytes | None = None):
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
    assert result.stdout.startswith(before) and result.stdout.endswith(after)
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
        (["infill", "no-such-file.py"], "no-such-file.py: No such file"),
        (["infill", "."], "dllm: .: Is a directory"),
        (["infill", "a\0b"], "null byte"),
        (["sample", "x = '\ud83d'"], "the prompt is not UTF-8: surrogates not allowed at character 5"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, reason):
    result = run(*arguments)
    assert result.exit_code == 2
    assert reason in result.stderr and "Traceback" not in result.stderr


CRLF = b"\xef\xbb\xbfa = 'caf\xc3\xa9'\r\nb = <mask:2>\rc = 3"


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    """`python -m dllm_kernels`, a process of its own."""
    return subprocess.run([sys.executable, "-m", "dllm_kernels", *arguments], **options)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\r\n"], ids=repr)
def test_infill_writes_the_bytes_that_it_read(tmp_path, end):
    """Line ends, byte order mark and the end of the file stay."""
    file = tmp_path / "given.py"
    file.write_bytes(CRLF + end)
    result = run("infill", str(file))
    before, after = (CRLF + end).split(b"<mask:2>")
    assert result.stdout_bytes.startswith(before) and result.stdout_bytes.endswith(after)
    assert result.stdout_bytes == run("infill", "-", stdin=CRLF + end).stdout_bytes


def test_the_prompt_is_written_as_it_was_given():
    for prompt in ("a = 1\r\nb = ", "# é\n", "x = 'a\tb'\n\n"):
        result = run("sample", prompt, "--max-new-tokens", "4")
        assert result.stdout_bytes.startswith(prompt.encode())


def test_text_is_utf8_whatever_the_locale():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    result = command("infill", "-", input=CRLF, capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    before, after = CRLF.split(b"<mask:2>")
    assert result.stdout.startswith(before) and result.stdout.endswith(after)


def test_input_that_is_not_utf8_is_told_by_file_and_byte(tmp_path):
    file = tmp_path / "latin.py"
    file.write_bytes(b"# caf\xe9\n<mask:2>")
    for result, name in (
        (run("infill", str(file)), str(file)),
        (run("infill", "-", stdin=file.read_bytes()), "standard input"),
        (run("sample", "-", stdin=file.read_bytes()), "standard input"),
        (run("sample", os.fsdecode(file.read_bytes())), "the prompt"),
    ):
        assert result.exit_code == 2 and result.stdout == ""
        assert f"dllm: {name} is not UTF-8: byte 0xe9 at offset 5" in result.stderr
        assert result.stderr.count("\n") == 1


def test_standard_output_that_is_full():
    for arguments in (["sample", "x = ", "--max-new-tokens", "1"], ["--help"]):
        with open("/dev/full", "wb") as full:
            result = command(*arguments, stdout=full, stderr=subprocess.PIPE)
        assert result.returncode == 1
        assert result.stderr == b"dllm: standard output cannot be written: No space left on device\n"


def test_a_reader_that_leaves_ends_the_command_quietly():
    read, write = os.pipe()
    os.close(read)
    result = command("info", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert result.returncode == 141 and result.stderr == b""


@pytest.mark.parametrize(
    ("closed", "code", "reason"),
    [
        ("<&-", 2, b"dllm: standard input is closed\n"),
        (">&-", 1, b"dllm: standard output is closed\n"),
        ("2>&-", 2, b""),
    ],
)
def test_streams_that_are_closed(closed, code, reason):
    shell = f'"$0" -m dllm_kernels sample - --cache none --max-new-tokens 0 {closed}'
    result = subprocess.run(["sh", "-c", shell, sys.executable], input=b"x", capture_output=True)
    assert (result.returncode, result.stderr, result.stdout) == (code, reason, b"")


def test_only_allowed_tokens_fill_a_gap():
    given = "assert 12 + 30 == <mask:2>\n"
    allowed = ("--allow", "7", "--allow", "8")
    result = run("infill", "-", *allowed, stdin=given)
    assert result.exit_code == 0, result.stderr
    assert set(result.stdout.removeprefix("assert 12 + 30 == ").strip()) <= {"7", "8"}
    result = run("infill", "-", "--allow", "several words", stdin=given)
    assert result.exit_code == 2 and "a position holds one" in result.stderr


def test_a_draft_may_change():
    draft = "def add(a, b):\n    return a + + b\n\n\nprint(add(1, 2))\n"
    result = run("infill", "-", "--draft", "--edit-threshold", "0.1", "--json", stdin=draft)
    fields = json.loads(result.stdout)
    assert fields["prompt"] == draft and fields["text"] != draft and len(fields["tokens"]) > 0
    assert result.exit_code == 0, result.stderr
    result = run("infill", "-", "--draft", stdin=draft)
    assert result.exit_code == 2 and "give edit_threshold" in result.stderr
