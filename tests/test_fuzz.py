"""tools/fuzz.py finds planted faults, crashes and hangs, and a seed repeats its cases exactly."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch

import dllm_kernels as dk

TOOL = Path(__file__).parent.parent / "tools" / "fuzz.py"


@pytest.fixture
def fuzz(monkeypatch):
    """The tool as a module."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    spec = importlib.util.spec_from_file_location("fuzz", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def planted():
    """planted(operator, wrong): until the test is over, `wrong` is the CPU kernel of an operator."""
    dk.token_stats  # noqa: B018  (operators are loaded with their functions)
    with torch.library._scoped_library("dllm_kernels", "IMPL") as scope, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        yield lambda name, wrong: scope.impl(name, wrong, "CPU", allow_override=True)


@pytest.fixture
def of_divergence(fuzz, monkeypatch):
    """The cases of token_divergence alone, as many as asked for: what was found in each."""
    from fuzzing import attention, layers, losses, unmasking

    monkeypatch.setattr(attention, "CALLS", {})
    monkeypatch.setattr(layers, "CALLS", {})
    monkeypatch.setattr(losses, "CALLS", {})
    monkeypatch.setattr(unmasking, "CALLS", {"token_divergence": unmasking.CALLS["token_divergence"]})
    return lambda seed, count: [fuzz.run_case(seed, index) for index in range(count)]


def _zeros(logits, previous, *options):
    return torch.zeros(logits.shape[:-1])


def test_nothing_is_found_in_right_operators(of_divergence):
    assert of_divergence(0, 20) == [None] * 20


def test_a_wrong_result_is_found(of_divergence, planted):
    planted("token_divergence", _zeros)
    found = [text for text in of_divergence(0, 20) if text]
    assert any("token_divergence: Finding: divergence differs from its reference" in text for text in found)


def test_an_error_without_a_name_is_found(of_divergence, planted):
    def nameless(*arguments):
        raise IndexError("out of range")

    planted("token_divergence", nameless)
    found = [text for text in of_divergence(0, 20) if text]
    assert any("IndexError instead of TypeError or ValueError" in text for text in found)


def test_a_seed_repeats_its_cases(of_divergence, planted):
    calls = []

    def noted(logits, previous, *options):
        calls.append((logits.flatten().tolist(), previous.flatten().tolist(), options))
        return _zeros(logits, previous)

    def run(seed):
        calls.clear()
        return of_divergence(seed, 12), str(calls)  # as text: NaN equals itself

    planted("token_divergence", noted)
    first = run(3)
    assert calls and run(3) == first
    assert run(4) != first


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("print(0); print(1, flush=True); import os; os.abort()", "the process ended with status -6"),
        ("print(0); print(1); print('found it', flush=True); raise SystemExit(3)", "with status 3"),
        ("import time; print(0); print(1, flush=True); time.sleep(60)", "no end after 1 s"),
    ],
)
def test_a_case_that_ends_its_process_or_never_ends_is_found(fuzz, monkeypatch, script, text):
    monkeypatch.setattr(fuzz, "LONGEST_CASE", 1)
    case, found, dead = fuzz.watch([sys.executable, "-c", script], 100)
    assert (case, dead) == (1, True) and text in found[-1][1] and found[-1][0] == 1
    if "found" in script:
        assert found[0] == (1, "it")


def test_time_that_is_over_is_no_finding(fuzz):
    script = "import time; print(4, flush=True); time.sleep(60)"
    assert fuzz.watch([sys.executable, "-c", script], 1) == (4, [], False)
