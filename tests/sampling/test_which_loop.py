"""dk.sample and dk.infill run in graphs where they may, else the host steers every step."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.sampling import api
from dllm_kernels.sampling.graphs import Launches, NotRecorded
from tests.sampling.tiny_models import MASK, prompts_of, tiny_model

KINDS = {"block": "block_causal", "prefix": "bidirectional", "dual": "bidirectional"}
OPTIONS = dict(max_new_tokens=19, block_size=8, threshold=0.3)


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(api, "_may_record", lambda plan, _: plan.model not in api._NOT_RECORDED)


@pytest.fixture
def launched(monkeypatch) -> list:
    names, launch = [], Launches.launch
    monkeypatch.setattr(Launches, "launch", lambda self, name: (names.append(name), launch(self, name))[1])
    return names


def assert_same(output: dk.SampleOutput, expected: dk.SampleOutput) -> None:
    for name in ("sequences", "lengths", "unmask_step", "row_forwards", "exact"):
        ours, other = getattr(output, name), getattr(expected, name)
        assert torch.equal(ours, other) if isinstance(ours, torch.Tensor) else ours == other, name


@pytest.mark.parametrize("cache", KINDS)
def test_completions_and_infilling(cache, launched, request):
    model, prompts = tiny_model(attention=KINDS[cache]), prompts_of(3, 30)
    canvases = [[*prompt, *[MASK] * 5, 1, 2, *[MASK] * 9] for prompt in prompts]
    calls = [
        lambda: dk.sample(model, prompts, cache=cache, **OPTIONS),
        lambda: dk.infill(model, canvases, cache=cache, block_size=8, steps=8),
    ]
    expected = [call() for call in calls]
    assert not launched
    request.getfixturevalue("as_on_a_gpu")
    for call, result in zip(calls, expected, strict=True):
        launched.clear()
        assert_same(call(), result)
        assert launched


def test_a_callback_leaves_them_to_the_host(as_on_a_gpu, launched):
    seen = []
    dk.sample(tiny_model(), prompts_of(9), on_round=lambda event: seen.append(event.forwards), **OPTIONS)
    assert seen and not launched


@pytest.mark.parametrize("cache", KINDS)
def test_a_model_that_cannot_be_recorded_is_left_to_the_host(cache, as_on_a_gpu, monkeypatch):
    model, prompts = copy.deepcopy(tiny_model(attention=KINDS[cache])), prompts_of(3, 30)
    expected = dk.sample(tiny_model(attention=KINDS[cache]), prompts, cache=cache, **OPTIONS)
    refused, record = [], Launches.record

    def refuse(self, name, run):
        """The model's forward; it comes first, or after a commit was recorded."""
        if name == "commit":
            return record(self, name, run)
        refused.append(name)
        raise NotRecorded("operation not permitted when stream is capturing")

    monkeypatch.setattr(Launches, "record", refuse)
    with pytest.warns(UserWarning, match=r"Qwen3ForCausalLM cannot be recorded as a CUDA graph.*capturing"):
        assert_same(dk.sample(model, prompts, cache=cache, **OPTIONS), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(dk.sample(model, prompts, cache=cache, **OPTIONS), expected)
    assert len(refused) == 1


CANVASES = SimpleNamespace(end=torch.tensor([5, 9]), draft=None, allowed=None)


def plan_on_a_gpu(scaling_of=lambda length: ()) -> SimpleNamespace:
    """What `_may_record` looks at."""
    runner = SimpleNamespace(scaling_of=scaling_of)
    return SimpleNamespace(model=torch.nn.Linear(1, 1), device=torch.device("cuda"), runner=runner)


def test_nothing_is_recorded_on_a_cpu_or_while_calls_are_checked(monkeypatch):
    plan = plan_on_a_gpu()
    assert api._may_record(plan, CANVASES)
    monkeypatch.setenv("DLLM_DEBUG", "1")
    assert not api._may_record(plan, CANVASES)
    monkeypatch.delenv("DLLM_DEBUG")
    plan.device = torch.device("cpu")
    assert not api._may_record(plan, CANVASES)


@pytest.mark.parametrize("control", ["draft", "allowed"])
def test_nothing_is_recorded_where_a_caller_controls_single_positions(control):
    canvases = SimpleNamespace(**{**vars(CANVASES), control: "given"})
    assert not api._may_record(plan_on_a_gpu(), canvases)


def test_nothing_is_recorded_of_a_model_in_several_processes():
    plan = plan_on_a_gpu()
    plan.model.bias.device_mesh = "as of a DTensor"
    assert not api._may_record(plan, CANVASES)


def test_nothing_is_recorded_where_positions_depend_on_the_length_of_a_row():
    assert api._may_record(plan_on_a_gpu(lambda length: 0), CANVASES)
    assert not api._may_record(plan_on_a_gpu(lambda length: length > 8), CANVASES)
