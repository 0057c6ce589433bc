"""`dllm bench`: the benchmarks of a checkout, for the dllm_kernels that is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
NEEDED = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "transformers": "transformers"}


def run(suites: Sequence[str], options: Sequence[str], folder: Path | None = None) -> int:
    """Run `suites` (none: all), print their table, and return pytest's exit status.

    options: for pytest. folder: the benchmarks of a checkout; None looks beside the package and in the
    current folder. Nothing is written unless an option names a file. Raises FileNotFoundError and
    ImportError, which say what is missing, and ValueError for an unknown suite.
    """
    folder = find(folder)
    files = paths(folder, suites)
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f'{", ".join(missing)} missing; install the test extras: pip install "dllm-kernels[test]"'
        )
    root = folder.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-save"]
    command += ["-c", str(root / "pyproject.toml"), "--rootdir", str(root), "-o", "pythonpath=", *options]
    path = os.pathsep.join([str(PACKAGE.parent), str(root)])  # the installed package before the checkout's
    return subprocess.run([*command, *map(str, files)], env=os.environ | {"PYTHONPATH": path}).returncode


def find(folder: Path | None) -> Path:
    """Return the benchmarks folder of a checkout."""
    candidates = (
        [folder] if folder else [PACKAGE.parent / "benchmarks", Path.cwd() / "benchmarks", Path.cwd()]
    )
    for candidate in candidates:
        if (candidate / "conftest.py").is_file() and (candidate / "workloads.py").is_file():
            return candidate.resolve()
    if folder:
        raise FileNotFoundError(
            f"--folder {folder}: it must be the benchmarks folder of a checkout of dllm-kernels"
        )
    raise FileNotFoundError(
        "the benchmarks are missing: they are not part of the package but the folder benchmarks of a "
        "checkout of dllm-kernels. Run this in the checkout, or name the folder with --folder"
    )


def paths(folder: Path, suites: Sequence[str]) -> list[Path]:
    """Return the files of `suites`, such as "attention" or "gpu/attention"; all of them if none is named."""
    if not suites:
        return [folder]
    known = {
        str(file.relative_to(folder).with_name(file.stem.removeprefix("test_"))): file
        for file in sorted(folder.rglob("test_*.py"))
    }
    for suite in suites:
        if suite not in known:
            raise ValueError(f"there is no suite {suite!r}; there are: {', '.join(known)}")
    return [known[suite] for suite in suites]
