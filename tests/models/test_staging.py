"""Files that replace others together: after any end, what was there, the new files, or no config.json."""

import itertools
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from dllm_kernels.models.staging import interrupted_save, staged

STALE = re.compile(r"weights-\d\.bin")
OLD = {"config.json": "old", "weights-1.bin": "old", "weights-2.bin": "old", "README.md": "mine"}
NEW = {"config.json": "new", "weights-2.bin": "new", "deep/extra.txt": "new"}
REPLACED = {**NEW, "README.md": "mine"}


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def replace(folder: Path) -> None:
    with staged(folder, STALE) as beside:
        fill(beside, NEW)


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "target", OLD)
    return tmp_path / "target"


def steps(monkeypatch, action, at: int) -> list[int]:
    """Call `action` before the rename, removal or creation with this number; returns those that came."""
    count, came = 0, []
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "open"):
        original = getattr(os, name)

        def counted(*arguments, original=original, **options):
            nonlocal count
            count += 1
            came.append(count)
            if count == at:
                action()
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, counted)
    return came


def test_new_files_replace_old_and_stale_ones_and_leave_others(folder):
    replace(folder)
    assert contents(folder) == REPLACED
    assert sorted(os.listdir(folder.parent)) == ["target"]


def test_a_folder_that_was_not_there(tmp_path):
    replace(tmp_path / "a" / "b")
    assert contents(tmp_path / "a" / "b") == NEW


def test_new_files_have_the_permissions_of_new_files(folder):
    os.umask(umask := os.umask(0))
    replace(folder)
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask & folder.stat().st_mode


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child")
@pytest.mark.parametrize("found", ["a checkpoint", "nothing"])
def test_a_process_killed_at_any_step_leaves_old_files_new_ones_or_no_config(tmp_path, monkeypatch, found):
    """And the next one that writes to the folder leaves nothing of it."""
    old = OLD if found == "a checkpoint" else {}
    outcomes = set()
    for at in itertools.count(1):
        folder = tmp_path / str(at) / "target"
        fill(folder, old)
        child = os.fork()
        if child == 0:
            with monkeypatch.context() as patch:
                steps(patch, lambda: os.kill(os.getpid(), signal.SIGKILL), at)
                replace(folder)
                os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        left = {name: text for name, text in contents(folder).items() if not name.startswith(".dllm-save-")}
        config = left.get("config.json", "none")
        outcomes.add(config)
        if config != "none":
            assert left == (OLD if config == "old" else REPLACED if old else NEW)
        elif old:
            saved = interrupted_save(folder)
            assert saved is None or (saved / "config.json").read_text() == "old"
        replace(folder)
        assert contents(folder) == (REPLACED if old else NEW)
        assert not any(name.startswith(".") for name in os.listdir(folder))
    assert outcomes == ({"old", "none", "new"} if old else {"none", "new"})


def test_a_save_that_fails_after_a_killed_one_restores_the_old_files(folder, monkeypatch):
    child = os.fork()
    if child == 0:
        moved = []

        def kill_at_third(*arguments, original=os.rename, **options):
            moved.append(arguments)
            if len(moved) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        os.rename = kill_at_third
        replace(folder)
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0
    assert not (folder / "config.json").exists() and interrupted_save(folder) is not None
    with pytest.raises(RuntimeError), staged(folder, STALE):
        raise RuntimeError("disk full")
    assert contents(folder) == OLD


def test_files_that_somebody_put_back_by_hand_stay(folder):
    staging = folder / ".dllm-save-0123"
    fill(staging, {"names.json": '["config.json", "weights-2.bin"]', "new/config.json": "new"})
    with pytest.raises(RuntimeError), staged(folder, STALE):
        raise RuntimeError("disk full")
    assert contents(folder) == OLD


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_exception_at_any_step_leaves_old_files_or_new_ones(tmp_path, monkeypatch, error):
    def fail():
        raise error

    outcomes = set()
    for at in itertools.count(1):
        folder = tmp_path / str(at) / "target"
        fill(folder, OLD)
        with monkeypatch.context() as patch, suppress(error):
            came = steps(patch, fail, at)
            replace(folder)
        if at not in came:
            break
        found = contents(folder)
        outcomes.add(found["config.json"])
        assert {name: text for name, text in found.items() if not name.startswith(".dllm")} in (OLD, REPLACED)
        replace(folder)
        assert contents(folder) == REPLACED
    assert outcomes == {"old", "new"}


def test_files_of_a_living_writer_stay(folder):
    with staged(folder, STALE) as first:
        fill(first, NEW)
        with staged(folder, STALE) as second:
            fill(second, {"config.json": "second"})
        assert contents(first) == NEW
    assert contents(folder) == REPLACED


@pytest.mark.parametrize("name", ["weights-2.bin", "config.json", "deep/extra.txt"])
def test_a_folder_in_the_place_of_a_file_fails_before_anything_is_replaced(folder, name):
    (folder / name).unlink(missing_ok=True)
    fill(folder, {f"{name}/kept": "mine"})
    before = contents(folder)
    with pytest.raises(IsADirectoryError, match=name):
        replace(folder)
    assert contents(folder) == before


def test_a_folder_called_like_a_stale_file_stays(folder):
    fill(folder, {"weights-3.bin/kept": "mine"})
    replace(folder)
    assert contents(folder) == {**REPLACED, "weights-3.bin/kept": "mine"}


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="which is a file"):
        replace(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
