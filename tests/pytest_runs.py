"""Runs of pytest that tests start."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict:
    """The environment without what pytest says of the run around it: pytest-benchmark times nothing in a
    worker of pytest-xdist."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | {"PYTHONPATH": str(ROOT)}
