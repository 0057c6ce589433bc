"""The recipes on two processes with DistributedDataParallel train as on one."""

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
    write_documents,
)
from tests.train.saved_checkpoints import assert_loads

RANKS_AND_STEPS = {"1x8": (1, 8, 1), "1x4x2": (1, 4, 2), "2x4": (2, 4, 1), "2x2x2": (2, 2, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models, data and the runs of two processes on them."""
    folder = tmp_path_factory.mktemp("ddp")
    write_checkpoint(folder / "mdlm")
    write_checkpoint(folder / "bd3lm", "qwen3", "block_causal")
    write_chat(folder / "chat.jsonl")
    write_documents(folder / "documents.jsonl")
    run_together([job for jobs in JOBS.values() for job in jobs(folder)], folder)
    return folder


def inputs(folder, model, name):
    return dict(model_name_or_path=folder / model, dataset=folder / "chat.jsonl", output_dir=folder / name)


def gradient_run(folder, model, shape, **given):
    """The options of one step on 8 examples; shape: ranks, batch size of each, accumulation steps."""
    _, batch, accumulation = RANKS_AND_STEPS[shape]
    sizes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    return gradient_options(**inputs(folder, model, f"{model}-{shape}"), **sizes, **given)


def four_steps(folder, name, **given):
    """The options of AdamW steps in which everything random takes part: order of examples, noise, dropout."""
    random = dict(lora=True, r=2, lora_dropout=0.3)
    saved = dict(max_steps=4, save_strategy="steps", save_steps=2)
    return options(**inputs(folder, "mdlm", name), **random, **saved, **given)


JOBS = {
    "normalised": lambda folder: [
        ("finetune", gradient_run(folder, model, shape))
        for model in ("mdlm", "bd3lm")
        for shape, (ranks, *_) in RANKS_AND_STEPS.items()
        if ranks == 2
    ],
    "checkpointed": lambda folder: [
        ("finetune", gradient_options(
            **inputs(folder, "bd3lm", "checkpointed"), gradient_checkpointing=True,
            per_device_train_batch_size=4, save_strategy="steps", save_steps=1,
        )),
    ],
    "resumed": lambda folder: [
        ("finetune", four_steps(folder, "whole")),
        ("finetune", four_steps(folder, "resumed", resume_from_checkpoint=folder / "whole/checkpoint-2")),
    ],
    "bfloat16": lambda folder: [
        ("finetune", options(**inputs(folder, "mdlm", "bfloat16"), bf16=True, max_steps=2)),
    ],
    "pretrained": lambda folder: [
        ("pretrain", options(
            model_name_or_path=folder / "bd3lm", dataset=folder / "documents.jsonl", from_scratch=True,
            output_dir=folder / "pretrained", packing=True, max_steps=2,
        )),
    ],
}  # fmt: skip


def assert_two_processes(run):
    found = facts(run)
    assert found["world_size"] == 2
    assert found["wrapper"] == "DistributedDataParallel"
    assert found["parameter_types"] == ["Parameter"]
    return found


@pytest.mark.parametrize("model", ["mdlm", "bd3lm"])
def test_gradients_do_not_depend_on_ranks_and_accumulation(folder, model):
    start = weights(folder / model)
    for shape, (ranks, *_) in RANKS_AND_STEPS.items():
        if ranks == 1:
            finetune(gradient_run(folder, model, shape))
        else:
            assert_two_processes(folder / f"{model}-{shape}")
    one = weights(folder / f"{model}-1x8")
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)
    for shape in RANKS_AND_STEPS:
        run = folder / f"{model}-{shape}"
        assert history(run)[0]["loss"] == pytest.approx(history(folder / f"{model}-1x8")[0]["loss"], rel=1e-5)
        for name, weight in weights(run).items():
            torch.testing.assert_close(weight, one[name], rtol=1e-5, atol=1e-6, msg=f"{shape}: {name}")


def test_checkpointing_changes_no_gradient(folder):
    found = assert_two_processes(folder / "checkpointed")
    assert found["gradient_checkpointing"]
    expected = weights(folder / "bd3lm-2x4")
    for name, weight in weights(folder / "checkpointed").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder):
    whole, resumed = folder / "whole", folder / "resumed"
    assert_two_processes(resumed)
    for file in ("adapter_model.safetensors", "checkpoint-4/optimizer.pt", "checkpoint-4/rng_state_1.pth"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file
    assert history(resumed)[:-1] == history(whole)[:-1]  # the last entry has times


def test_only_adapters_are_trained_and_saved(folder):
    found = facts(folder / "whole")
    assert 0 < found["trained_weights"] < found["weights"] / 5
    assert not (folder / "whole" / "model.safetensors").exists()


def test_bfloat16_computes_over_float32_weights(folder):
    found = assert_two_processes(folder / "bfloat16")
    assert (found["mixed_precision"], found["dtypes"]) == ("bf16", ["float32"])


def test_pretraining_starts_from_random_weights(folder):
    assert_two_processes(folder / "pretrained")
    given, trained = weights(folder / "bd3lm"), weights(folder / "pretrained")
    assert all((trained[name] - given[name]).abs().max() > 0.01 for name in given if given[name].dim() == 2)


@pytest.mark.parametrize("run", ["checkpointed", "checkpointed/checkpoint-1", "bfloat16", "pretrained"])
def test_checkpoints_load(folder, run):
    assert_loads(folder / run)


@pytest.mark.parametrize("run", ["whole", "whole/checkpoint-2"])
def test_adapters_load(folder, run):
    assert_loads(folder / run, adapters=True)
