"""Runs as JSON: one object for a script, or a line for each of many prompts."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dllm_kernels.cli.commands import FAILED, fail
from dllm_kernels.cli.streams import LARGEST, check_writable, write_text


@dataclass(frozen=True)
class Prompt:
    """text: what is continued or filled; with a chat template also a list of messages. line: its number in
    the file. id: what its line is known by, copied to the output; None: nothing."""

    text: str | list
    line: int
    id: object = None


def read_prompts(file: str, messages: bool = False) -> list[Prompt]:
    """Return the prompts of a JSONL file, or of standard input where it is -.

    A line is a string or {"prompt": ..., "id": ...}; with `messages` a prompt may be a list of messages.
    Empty lines are left out. ValueError names the line that is anything else.
    """
    name = "standard input" if file == "-" else file
    if file == "-":
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        prompts = list(_prompts(name, sys.stdin.buffer, messages))
    else:
        with open(file, "rb") as stream:
            prompts = list(_prompts(name, stream, messages))
    if not prompts:
        raise ValueError(f"{name} holds no prompts")
    return prompts


def _prompts(name: str, stream, messages: bool) -> Iterator[Prompt]:
    number = 0
    while data := stream.readline(LARGEST + 1):
        number += 1
        where = f"{name} line {number}"
        if len(data) > LARGEST:
            raise ValueError(f"{where} is longer than {LARGEST // 2**20} MiB")
        if not data.strip():
            continue
        try:
            entry = json.loads(data.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(f"{where} is not UTF-8: byte 0x{byte:02x} at offset {error.start}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise ValueError(f"{where} is nested too deeply") from None
        given = entry if isinstance(entry, dict) else {"prompt": entry}
        allowed = str | list if messages else str
        if not isinstance(given.get("prompt"), allowed):
            wanted = "a string or a list of messages" if messages else "a string"
            raise ValueError(f'{where}: expected {wanted}, or {{"prompt": {wanted}, "id": ...}}')
        yield Prompt(given["prompt"], number, given.get("id"))


def by_line(error: Exception, prompts: list[Prompt], file: str) -> str:
    """Return an error of `dk.sample` with the line of a prompt in place of its index."""
    name = "standard input" if file == "-" else file

    def line(found: re.Match) -> str:
        index = int(found[1] or found[2])
        return f"{name} line {prompts[index].line}" if index < len(prompts) else found[0]

    return re.sub(r"\b(?:prompts|canvases)\[(\d+)\]|\brow (\d+)\b", line, str(error))


def record(output, row: int, prompt: str | list, known_by: object = None) -> dict:
    """Return one row of a SampleOutput for a script.

    known_by: the id of its line. tokens: ids that were generated, up to the first end token. logprobs:
    of each of them, if recorded.
    """
    fields = {} if known_by is None else {"id": known_by}
    generated = (output.unmask_step[row] >= 0).nonzero()[:, 0]
    if output.filled is None:
        generated = generated[: int(output.lengths[row])]
    fields |= {
        "prompt": prompt,
        "text": output.texts[row],
        "tokens": output.sequences[row][generated].tolist(),
        "forwards": int(output.row_forwards[row]),
        "exact": output.exact,
    }
    if output.logprobs is not None:
        fields["logprobs"] = [round(value, 6) for value in output.logprobs[row][generated].tolist()]
    if output.top_logprobs is not None:
        tokens, values = (part[row][generated].tolist() for part in output.top_logprobs)
        fields["top_logprobs"] = [
            [[token, round(value, 6)] for token, value in zip(*both, strict=True)]
            for both in zip(tokens, values, strict=True)
        ]
    return fields


def line_of(fields: dict) -> str:
    """Return a record as one line of JSON."""
    return json.dumps(fields, ensure_ascii=False) + "\n"


def print_json(fields: dict) -> None:
    write_text(json.dumps(fields, ensure_ascii=False, indent=2) + "\n")


class Lines:
    """Where records go. `write` takes one; `kept` says where those of an unfinished run are."""

    def __init__(self, stream, partial: Path | None = None):
        self.stream, self.partial, self.count = stream, partial, 0

    def write(self, fields: dict) -> None:
        data = line_of(fields).encode()
        if self.partial is None:
            write_text(data.decode())
        else:
            try:
                self.stream.write(data)
                self.stream.flush()
            except OSError as error:
                fail(f"{self.partial} cannot be written: {error.strerror}", FAILED)
        self.count += 1

    @property
    def kept(self) -> str:
        return "" if self.partial is None or not self.count else f"; {self.count} lines are in {self.partial}"


@contextmanager
def lines_to(target: Path | None) -> Iterator[Lines]:
    """Yield where to write records: standard output, or a file that is there only once it is complete. Until
    then its lines are in TARGET.partial, which stays after an error if it holds any."""
    if target is None:
        yield Lines(sys.stdout)
        return
    target = target.resolve()
    check_writable(target)
    partial = target.with_name(f"{target.name}.partial")
    with open(partial, "wb") as stream:
        lines = Lines(stream, partial)
        try:
            yield lines
            os.fsync(stream.fileno())
        except BaseException:
            if not lines.count:
                partial.unlink(missing_ok=True)
            raise
    if target.exists():
        partial.chmod(target.stat().st_mode & 0o7777)
    os.replace(partial, target)
