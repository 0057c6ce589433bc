"""Texts of the command line: UTF-8 bytes in and out, whatever the locale, and nothing half-written.

Given text comes out byte for byte. A terminal gets it without control characters, which could do with the
terminal what they like.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from dllm_kernels.cli.commands import FAILED, fail
from dllm_kernels.viewer.control_characters import harmless

LARGEST = 64 * 2**20  # bytes of a text that is read as a whole


def given_text(argument: str, name: str) -> str:
    """Return an argument that is a text, or standard input where it is -."""
    return _decoded(argument, lambda: os.fsencode(argument), name)


def file_text(file: str) -> str:
    """Return what is in a file, or standard input where it is -."""
    return _decoded(file, lambda: file_bytes(file), file)


def file_bytes(file: str | Path) -> bytes:
    """Return the bytes of a file; ValueError if it is larger than LARGEST, or never ends."""
    with open(file, "rb") as stream:
        if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode) and not stream.isatty():
            raise ValueError("is a device, not a file")
        return _bounded(stream)


def _bounded(stream) -> bytes:
    data = stream.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"is larger than {LARGEST // 2**20} MiB, the most that is read as one text")
    return data


def _decoded(argument: str, read: Callable[[], bytes], name: str) -> str:
    try:
        if argument == "-":
            name, read = "standard input", lambda: _bounded(sys.stdin.buffer)
            if sys.stdin is None:
                fail(f"{name} is closed")
        return read().decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        fail(f"{name} is not UTF-8: byte 0x{byte:02x} at offset {error.start} ({error.reason})")
    except UnicodeEncodeError as error:
        fail(f"{name} is not UTF-8: {error.reason} at character {error.start}")
    except (OSError, ValueError) as error:
        fail(f"{name}: {getattr(error, 'strerror', None) or error}")


def write_text(text: str) -> None:
    """Write a text to standard output as it is; to a terminal without control characters, with a line end."""
    if sys.stdout.isatty():
        text = harmless(text)
        text += "" if text.endswith("\n") else "\n"
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def write_file(target: Path, data: bytes) -> None:
    """Write a file as a whole, or not at all; an existing one keeps its mode, and a link its place."""
    target = target.resolve()
    check_writable(target)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(beside, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            beside.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(beside, target)
    except OSError as error:
        fail(f"{target} cannot be written: {error.strerror}", FAILED)
    finally:
        beside.unlink(missing_ok=True)


def check_writable(target: Path) -> None:
    """Refuse a file that must not or cannot be written, before there is work to lose."""
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give a file")
    if target.exists() and not target.is_file():
        raise ValueError(f"{target} is not a regular file, which cannot be replaced as a whole")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}")
    if target.exists() and not (os.access(target, os.W_OK) and target.stat().st_mode & 0o222):
        raise ValueError(f"{target} is read-only")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{target}: the folder {target.parent} is read-only")
