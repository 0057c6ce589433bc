"""docs/architecture.md names what the tree holds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
NAMES = sorted(set(re.findall(r"`([^`\n]+)`", TEXT)))
PATHS = [name for name in NAMES if re.fullmatch(r"[\w.]+(/[\w.]+)+", name)]
CLASSES = [name for name in NAMES if re.fullmatch(r"[A-Z][a-z]+[A-Z]\w+", name)]


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path):
    assert (ROOT / path).exists()


def test_classes_exist():
    sources = "".join(path.read_text() for path in (ROOT / "dllm_kernels").rglob("*.py"))
    assert len(CLASSES) > 3
    assert [name for name in CLASSES if f"class {name}" not in sources] == []


@pytest.mark.parametrize(
    ("rows", "file"),
    [
        (re.findall(r"`(\{\"threshold\".*?\}\}\})`", TEXT), "csrc/core/rule.h"),
        (
            re.findall(r"^    \"dual\": Scheme.*?^    \),$", TEXT, re.S | re.M),
            "dllm_kernels/sampling/views.py",
        ),
        (
            re.findall(r"^    \"Dream\": Family.*?^    \)$", TEXT, re.S | re.M),
            "dllm_kernels/models/families.py",
        ),
    ],
)
def test_rows_of_tables_are_those_of_the_code(rows, file):
    (row,) = rows
    assert "".join(row.split()) in "".join((ROOT / file).read_text().split())
