"""The fixture `compare`: what it checks, times and records, seen in what a run of small benchmarks writes."""

import json
import subprocess
import sys

import pytest

from tests.pytest_runs import environment

SUITE = """
import time
import torch
from benchmarks.self_timed import SelfTimed

def test_steps(compare):
    compare(
        lambda x: time.sleep(0.04),
        {"slept": lambda x: time.sleep(0.08), "self timed": SelfTimed(lambda x: 0.25)},
        inputs=lambda: (torch.zeros(2),),
        title="four steps",
        rounds=2,
        steps=4,
    )

def test_tokens(compare):
    compare(
        lambda: torch.tensor([1, 2, 3]),
        {"other": lambda: torch.tensor([1, 2, 3])},
        tolerance={"atol": 0, "rtol": 0},
        tokens=len,
        batch=8,
    )

def test_wrong(compare):
    compare(lambda: torch.ones(2), {"wrong": lambda: torch.zeros(2)}, tolerance={"atol": 0, "rtol": 0})
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the output of pytest, and the cases that were written."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_small.py").write_text(SUITE)
    options = ["-q", "-p", "benchmarks.conftest", "-p", "no:cacheprovider", "--seconds", "0.01"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "test_small.py", *options, "--no-save", "--json", "small.json"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    (content,) = json.loads((folder / "small.json").read_text()).values()
    return ended.stdout, content["suites"]["small"]


def test_a_result_that_differs_fails_by_name_and_leaves_no_row(run):
    printed, cases = run
    assert "wrong: Tensor-likes are not equal" in printed
    assert "1 failed, 2 passed" in printed
    assert set(cases) == {"steps", "tokens"}


def test_times_are_of_one_step_and_what_times_itself_is_believed(run):
    case = run[1]["steps"]
    assert case["title"] == "four steps" and case["rounds"] == 2
    assert case["ours_seconds"]["median"] >= 0.04 / 4
    assert case["baselines"]["slept"]["seconds"]["median"] >= 0.08 / 4
    assert case["baselines"]["self timed"]["seconds"] == {"median": 0.25, "p20": 0.25, "p80": 0.25}


def test_rows_hold_tokens_and_their_place_on_an_axis(run):
    case = run[1]["tokens"]
    assert (case["axis"], case["size"]) == ("batch", 8)
    assert case["tokens"] == case["baselines"]["other"]["tokens"] == 3
    assert case["rounds"] >= 5
