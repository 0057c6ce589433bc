"""Checkpoint folders of a run: each is complete and lists its files, or does not exist.

A checkpoint is written to `unfinished-checkpoints/` beside its place. When all ranks have written their
files, it gets a list of them and their sizes and is moved to its place. So a process that dies leaves no
folder that looks like a checkpoint, and a truncated or lost file is found before a run resumes from it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

UNFINISHED = "unfinished-checkpoints"
FILES = "checkpoint_files.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# Of transformers, of FSDP, and of DeepSpeed.
_OPTIMIZERS = ("optimizer", "global_step")


def finish_checkpoint(unfinished: Path, target: Path) -> None:
    """List the files of `unfinished` in it and move it to `target`, replacing a checkpoint that is there."""
    sizes = {str(path.relative_to(unfinished)): path.stat().st_size for path in _files(unfinished)}
    (unfinished / FILES).write_text(json.dumps(sizes, indent=1) + "\n")
    replaced = unfinished.parent / f"replaced-{target.name}"
    if target.exists():
        target.rename(replaced)
    unfinished.rename(target)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def check_complete(folder: str | Path) -> None:
    """Raise ValueError, naming the last complete checkpoint beside it, if `folder` is not complete."""
    folder = Path(folder)
    fault = _fault(folder)
    if fault is None:
        return
    previous = last_complete(folder.parent, before=folder)
    advice = f"; the last complete checkpoint beside it is {previous}" if previous else ""
    raise ValueError(f"resume_from_checkpoint is {str(folder)!r}, which {fault}{advice}")


def last_complete(run: str | Path, before: Path | None = None) -> Path | None:
    """Return the complete checkpoint of the highest step in `run`, other than `before`; None without one."""
    run = Path(run)
    if not run.is_dir():
        return None
    found = [
        path for path in run.iterdir() if _NAME.fullmatch(path.name) and path.is_dir() and path != before
    ]
    for path in sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True):
        if _fault(path) is None:
            return path
    return None


def _fault(folder: Path) -> str | None:
    """Return the fault of a checkpoint; None if it has none."""
    if not folder.is_dir():
        return "is not a folder"
    try:
        sizes = json.loads((folder / FILES).read_text())
        sizes = {str(name): int(size) for name, size in sizes.items()}
    except FileNotFoundError:
        return f"was not completed: it has no {FILES}"
    except (ValueError, AttributeError, TypeError):
        return f"is corrupt: {FILES} is not the list that was written"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"is incomplete: {name} is missing"
        if path.stat().st_size != size:
            return f"is corrupt: {name} has {path.stat().st_size} bytes, and {size} were written"
    if not any(name.startswith(_OPTIMIZERS) for name in sizes):
        return "holds no optimizer: it was saved with save_only_model"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
