"""`dllm edit`: nothing is written without --write, and then as a whole; files that are refused."""

import json
import os
import stat

import pytest
from typer.testing import CliRunner

from dllm_kernels import edit
from dllm_kernels.cli import app, streams

TEXT = b"import sys\n\n\ndef add(a, b):\n    total = a + b\n    return total\n\n\nprint(add(1, 2))\n"
OPTIONS = ("--lines", "5-6", "--tokens", "6")


def run(*arguments: str):
    return CliRunner().invoke(app, ["edit", *map(str, arguments)])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "module.py"
    path.write_bytes(TEXT)
    path.chmod(0o640)
    return path


def others(file) -> list[str]:
    return [path.name for path in file.parent.iterdir() if path != file]


def test_a_proposal_is_a_diff_and_is_not_written(file):
    result = run(file, *OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("--- a/module.py\n+++ b/module.py\n@@ -2,8 +2,")
    assert "-    total = a + b\n" in result.stdout
    assert "nothing is written without --write" in result.stderr
    assert file.read_bytes() == TEXT and not others(file)


def test_write_writes_what_the_diff_says_and_keeps_the_mode(file):
    proposed = json.loads(run(file, *OPTIONS, "--json").stdout)
    assert not proposed["written"] and file.read_bytes() == TEXT
    result = run(file, *OPTIONS, "--write", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == proposed | {"written": True}
    assert file.read_text() == TEXT.decode().replace("    total = a + b\n    return total", proposed["text"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and not others(file)


def test_auto_is_the_best_of_several_lengths(file):
    best, *rest = json.loads(run(file, "--lines", "5-6", "--json").stdout)["candidates"]
    assert len(rest) > 2 and all(one["mean_logprob"] <= best["mean_logprob"] for one in rest)


def test_a_link_stays_a_link(file):
    link = file.with_name("link.py")
    link.symlink_to(file.name)
    assert run(link, *OPTIONS, "--write").exit_code == 0
    assert link.is_symlink() and file.read_bytes() != TEXT


def test_a_failed_write_leaves_the_file_as_it_was(file, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streams.os, "fsync", full)
    result = run(file, *OPTIONS, "--write")
    assert result.exit_code == 1 and "cannot be written: No space left on device" in result.stderr
    assert file.read_bytes() == TEXT and not others(file)


def test_a_file_that_changes_meanwhile_is_not_written(file, monkeypatch):
    propose = edit.propose

    def slow(*arguments, **options):
        file.write_bytes(b"# newer\n" + TEXT)
        return propose(*arguments, **options)

    monkeypatch.setattr(edit, "propose", slow)
    result = run(file, *OPTIONS, "--write")
    assert result.exit_code == 2 and "was changed while its new lines were made" in result.stderr
    assert file.read_bytes() == b"# newer\n" + TEXT


def test_files_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dllm_kernels.cli.edit.load", lambda *_, **__: pytest.fail("the model was loaded"))
    made = {name: tmp_path / name for name in ("latin", "null", "read-only", "huge", "pipe")}
    made["latin"].write_bytes(b"# caf\xe9\n")
    made["null"].write_bytes(b"a\0b\n")
    made["read-only"].write_bytes(TEXT)
    made["read-only"].chmod(0o444)
    with open(made["huge"], "wb") as stream:
        stream.truncate(streams.LARGEST + 1)
    os.mkfifo(made["pipe"])
    reasons = {
        made["latin"]: "latin is not UTF-8: byte 0xe9 at offset 5",
        made["null"]: "null holds a null byte",
        made["read-only"]: "read-only is read-only",
        made["huge"]: "huge is larger than 64 MiB",
        made["pipe"]: "pipe is not a regular file",
        tmp_path: "is a folder; give a file",
        tmp_path / "missing": "No such file",
    }
    for path, reason in reasons.items():
        result = run(path, "--lines", "1", "--write")
        assert result.exit_code == 2 and reason in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--lines", "0"), "--lines is '0'"),
        (("--lines", "6-5"), "--lines is '6-5'"),
        (("--lines", "a"), "such as 7 or 10-14"),
        (("--lines", "5-60"), "has 9 lines"),
        (("--lines", "5", "--tokens", "few"), "--tokens is 'few'"),
        (("--lines", "5", "--tokens", "0"), "--tokens is '0'"),
        ((), "missing option '--lines'"),
    ],
)
def test_lines_and_tokens_that_mean_nothing(file, options, reason):
    result = run(file, *options)
    assert result.exit_code == 2 and reason in result.stderr
    assert result.stderr.count("\n") == 1
