"""The ZeRO configurations on two processes, with gradient checkpointing, train as one process does."""

import pytest
import torch

from dllm_train.recipes.finetune import finetune
from tests.train.recipe_runs import (
    facts,
    gradient_options,
    history,
    options,
    run_together,
    weights,
    write_chat,
    write_checkpoint,
)
from tests.train.saved_checkpoints import assert_loads

pytest.importorskip("deepspeed")
STAGES = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, data and the run of one process on them."""
    folder = tmp_path_factory.mktemp("deepspeed")
    write_checkpoint(folder / "model", "qwen3", "block_causal", tie_word_embeddings=False)
    write_chat(folder / "chat.jsonl")
    finetune(gradient_options(**inputs(folder, "one"), per_device_train_batch_size=4))
    return folder


def inputs(folder, name):
    return dict(model_name_or_path=folder / "model", dataset=folder / "chat.jsonl", output_dir=folder / name)


@pytest.fixture(scope="module", params=STAGES)
def stage(request, folder):
    """The name of a configuration, whose runs are in folders that begin with it."""
    name = request.param
    saved = dict(max_steps=2, save_strategy="steps", save_steps=1, gradient_checkpointing=True)
    runs = [
        gradient_options(**inputs(folder, f"{name}-gradient"), gradient_checkpointing=True),
        options(**inputs(folder, f"{name}-whole"), **saved),
        options(
            **inputs(folder, f"{name}-resumed"), **saved,
            resume_from_checkpoint=folder / f"{name}-whole" / "checkpoint-1",
        ),
    ]  # fmt: skip
    runs.append(options(**inputs(folder, f"{name}-adapters"), **saved, lora=True))
    run_together([("finetune", run) for run in runs], folder, name)
    return name


def assert_distributed(folder, stage, run):
    found = facts(folder / f"{stage}-{run}")
    assert found["world_size"] == 2
    assert found["wrapper"] == "DeepSpeedEngine"
    assert found["parameter_types"] == (["ZeRO-3"] if stage == "zero3" else ["Parameter"])
    assert found["gradient_checkpointing"]
    assert found["weights"] == facts(folder / "one")["weights"]


def test_gradients_are_those_of_one_process(folder, stage):
    assert_distributed(folder, stage, "gradient")
    run, one = folder / f"{stage}-gradient", folder / "one"
    assert history(run)[0]["loss"] == pytest.approx(history(one)[0]["loss"], rel=1e-5)
    start, expected = weights(folder / "model"), weights(one)
    assert any((expected[name] - start[name]).abs().max() > 1e-3 for name in start)
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder, stage):
    assert_distributed(folder, stage, "resumed")
    whole = weights(folder / f"{stage}-whole")
    for name, weight in weights(folder / f"{stage}-resumed").items():
        assert torch.equal(weight, whole[name]), name


def test_adapters_are_trained(folder, stage):
    found = facts(folder / f"{stage}-adapters")
    assert found["wrapper"] == "DeepSpeedEngine"
    assert 0 < found["trained_weights"] < found["weights"]
    for run in (f"{stage}-adapters", f"{stage}-adapters/checkpoint-1"):
        assert_loads(folder / run, adapters=True)


def test_checkpoints_load(folder, stage):
    for run in ("gradient", "whole", "whole/checkpoint-1"):
        assert_loads(folder / f"{stage}-{run}")
