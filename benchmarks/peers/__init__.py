"""Other projects, run as their users run them, from what --peer names.

    --peer NAME=DIR              a checkout of NAME: llada, fast-dllm or dllm
    --peer-python NAME=PYTHON    the interpreter that has what it needs (default: this one)
    --peer llama.cpp=BINARY      llama.cpp's llama-diffusion-cli

Nothing of theirs is stored or built here. A checkout runs in a process of its own (see worker.py).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

TITLES = {"llada": "LLaDA", "fast-dllm": "Fast-dLLM", "dllm": "dLLM", "llama.cpp": "llama.cpp"}


@dataclasses.dataclass(frozen=True)
class Peer:
    """A checkout and the interpreter that runs it; of llama.cpp the program, which runs by itself."""

    name: str
    path: Path
    python: str = sys.executable

    @property
    def title(self) -> str:
        return TITLES[self.name]


def named(peers: Sequence[str], pythons: Sequence[str] = ()) -> dict[str, Peer]:
    """Return the peers that --peer and --peer-python name.

    Raises ValueError for a name that is not known, a path that is not there, and an interpreter of no peer.
    """
    interpreters = dict(_split("--peer-python", value, "PYTHON") for value in pythons)
    found = {}
    for value in peers:
        name, path = _split("--peer", value, "DIR")
        if name not in TITLES:
            raise ValueError(f"--peer {value}: {name!r} is not known; known: {', '.join(TITLES)}")
        python = _interpreter(name, interpreters.pop(name, None))
        found[name] = Peer(
            name, _program(value, path) if name == "llama.cpp" else _folder(value, path), python
        )
    for name in interpreters:
        raise ValueError(f"--peer-python {name}=...: no --peer {name}=DIR is given")
    return found


def _split(option: str, value: str, what: str) -> tuple[str, str]:
    name, equals, rest = value.partition("=")
    if not (name and equals and rest):
        raise ValueError(f"{option} {value}: it must be NAME={what}")
    return name, rest


def _interpreter(name: str, python: str | None) -> str:
    if python is None:
        return sys.executable
    if name == "llama.cpp":
        raise ValueError(f"--peer-python llama.cpp={python}: llama.cpp is a program and needs no interpreter")
    if shutil.which(python) is None:
        raise ValueError(f"--peer-python {name}={python}: there is no such program")
    return python


def _folder(value: str, path: str) -> Path:
    if not Path(path).is_dir():
        raise ValueError(f"--peer {value}: there is no such folder")
    return Path(path).resolve()


def _program(value: str, path: str) -> Path:
    program = Path(path).resolve()
    if not program.is_file() or not os.access(program, os.X_OK):
        raise ValueError(f"--peer {value}: it must be the program llama-diffusion-cli")
    return program
