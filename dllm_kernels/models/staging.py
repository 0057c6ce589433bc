"""Replace files in a folder together, or not at all.

New files are written to a staging folder inside the target. Once they are complete, config.json of the target
moves out before any other file, and the new one moves in after all others. A process that dies in between
leaves a folder without config.json, which nothing loads, and never old files beside new ones. Every step is a
rename, so an exception undoes completed steps, and the next load or save undoes those of a dead process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: leftovers of dead processes stay
    fcntl = None

CONFIG = "config.json"
_PREFIX = ".dllm-save-"
# In a staging folder: complete files, those they replace, the names of all new ones, the writer's lock.
_NEW, _REPLACED, _NAMES, _LOCK = "new", "replaced", "names.json", "lock"


@contextmanager
def staged(folder: Path, stale: re.Pattern) -> Iterator[Path]:
    """Yield a folder to write into; its files, config.json among them, then replace those of `folder`.

    stale: names of files in `folder` that are removed unless they are written again; all others stay.
    After an exception `folder` is what it was.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder is {str(folder)!r}, which is a file")
    found = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f"{_PREFIX}{uuid.uuid4().hex[:8]}"
    with _locked(folder):
        _remove_leftovers(folder)
        for name in (_NEW, _REPLACED):
            (staging / name).mkdir(parents=True)
        alive = _lock(staging / _LOCK)
    try:
        yield staging / _NEW
        names = _finish_files(staging / _NEW, folder)
        with _locked(folder):
            _replace(folder, staging, names, stale)
    except BaseException:
        with _locked(folder):
            _undo(folder, staging)
        _remove(staging)
        if not found:
            with suppress(OSError):  # it holds other files
                folder.rmdir()
        raise
    finally:
        _unlock(alive)
    _remove(staging)


def recover(folder: Path) -> None:
    """Put the files back that a dead save moved out of `folder`, as far as it can be written to."""
    if interrupted_save(folder) is not None:
        with suppress(OSError), _locked(folder):
            _remove_leftovers(folder)


def interrupted_save(folder: Path) -> Path | None:
    """Return the files that a save moved out of `folder` before it died; None if there are none."""
    if (folder / CONFIG).exists():
        return None
    replaced = (path / _REPLACED for path in folder.glob(f"{_PREFIX}*"))
    return next((path for path in replaced if (path / CONFIG).exists()), None)


# ---- moving ------------------------------------------------------------------------------------------------
def _finish_files(new: Path, folder: Path) -> list[str]:
    """Give the files in `new` the permissions of new files, sync them to disk, and return their names."""
    names = _files(new)
    for name in names:
        (new / name).chmod(folder.stat().st_mode & 0o666)  # safetensors leaves 0600
        _sync(new / name)
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder, and a file of that name is to be written")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    return names


def _replace(folder: Path, staging: Path, names: list[str], stale: re.Pattern) -> None:
    (staging / _NAMES).write_text(json.dumps(names))
    _sync(staging / _NAMES)
    others = {path.name for path in folder.iterdir() if path.is_file() and stale.fullmatch(path.name)}
    old = [name for name in {*names, *others} if os.path.lexists(folder / name)]
    for name in sorted(old, key=lambda name: name != CONFIG):
        _move(name, folder, staging / _REPLACED)
    for name in sorted(names, key=lambda name: name == CONFIG):
        _move(name, staging / _NEW, folder)
    _sync(folder)


def _undo(folder: Path, staging: Path) -> None:
    """Put back what `_replace` moved, unless it came to its end; both may stop between any two steps."""
    new, replaced = staging / _NEW, staging / _REPLACED
    if os.path.lexists(folder / CONFIG):  # nothing has moved, or all has, or it was repaired by hand
        return
    with suppress(FileNotFoundError, ValueError):  # nothing has moved yet
        names = json.loads((staging / _NAMES).read_text())
        for name in names:
            if not (new / name).exists() and os.path.lexists(folder / name):
                _move(name, folder, new)
    for name in sorted(_files(replaced), key=lambda name: name == CONFIG):
        _move(name, replaced, folder)
    (staging / _NAMES).unlink(missing_ok=True)


def _remove(staging: Path) -> None:
    """Remove a staging folder with nothing to undo, so that at no moment there is something to undo."""
    shutil.rmtree(staging / _REPLACED, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


def _move(name: str, source: Path, target: Path) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).rename(target / name)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot sync folders
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


# ---- who else writes here ----------------------------------------------------------------------------------
def _remove_leftovers(folder: Path) -> None:
    """Undo and remove the staging folders of writers that died."""
    for staging in folder.glob(f"{_PREFIX}*"):
        alive = _lock(staging / _LOCK, wait=False)
        if alive is None:
            continue
        try:
            _undo(folder, staging)
        finally:
            _unlock(alive)
        _remove(staging)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other writers of `folder` waiting, in other processes too."""
    descriptor = _lock(folder)
    try:
        yield
    finally:
        _unlock(descriptor)


def _lock(path: Path, wait: bool = True) -> int | None:
    """Return a lock that ends with the process at the latest; None without locks, or if another has it."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, flags, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
