"""Loading and saving leave the rest of the process as it is, in any number of threads."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import dllm_kernels as dk
from tests.sampling.tiny_models import tiny_model


@pytest.fixture
def model():
    return copy.deepcopy(tiny_model("qwen3"))


@pytest.fixture
def hasty():
    """Let threads take turns often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(*works) -> None:
    """Run every function in a thread of its own, and raise the first error."""
    errors = []

    def run(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def of_the_process() -> tuple:
    """Return what a model made now would be initialised with."""
    drawn = torch.zeros(9, device="cpu")
    nn.init.normal_(drawn)
    return bool(drawn.any()), PreTrainedModel.init_weights, torch.get_default_dtype()


def test_models_that_other_threads_make_while_one_is_saved_are_initialised(model, tmp_path):
    expected = of_the_process()
    model.to(torch.bfloat16)
    found = []
    hook = nn.modules.module.register_module_parameter_registration_hook(
        lambda *_: found.append(of_the_process())
    )
    try:
        dk.save(model, None, tmp_path)
    finally:
        hook.remove()
    assert found and set(found) == {expected}


def test_threads_that_load_and_save(model, tmp_path, hasty):
    expected = of_the_process()
    dk.save(model, None, tmp_path / "source")

    def load(dtype):
        for _ in range(3):
            again, _ = dk.load(tmp_path / "source", device="cpu", dtype=dtype)
            assert again.dtype == dtype

    def save(name):
        own = copy.deepcopy(model)
        for _ in range(3):
            dk.save(own, None, tmp_path / name)

    in_threads(
        lambda: load(torch.bfloat16), lambda: load(torch.float32), lambda: save("a"), lambda: save("b")
    )
    assert of_the_process() == expected
    weight = type(model)(model.config).lm_head.weight
    assert 0.5 < weight.std() / model.config.initializer_range < 2


def test_threads_that_save_one_model(model, tmp_path, hasty):
    def save(name):
        for turn in range(4):
            dk.save(model, None, tmp_path / f"{name}{turn}")

    in_threads(lambda: save("best"), lambda: save("last"))
    assert "should_save_on_this_rank" not in vars(model)
    again, _ = dk.load(tmp_path / "last3", device="cpu")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
