"""fsdp2.yaml on two processes: weights are DTensors, gradients those of one process, checkpoints whole.

accelerate takes FSDP on GPUs alone. `recipe_runs` lets it take CPUs, and all else is what happens on GPUs.
"""

import subprocess

import pytest
import torch

from dllm_train.recipes.finetune import finetune
from dllm_train.sharding import choose_fsdp_units
from tests.train.recipe_runs import (
    environment,
    facts,
    gradient_options,
    history,
    launcher,
    options,
    run_together,
    weights,
    write_chat,
    write_checkpoint,
)
from tests.train.saved_checkpoints import assert_loads
from tests.train.tiny_models import tiny

MODELS = {
    "mdlm": ("llama", "bidirectional"),
    "bd3lm": ("qwen3", "block_causal"),  # its head and its embedding are one weight
    "bert": ("modernbert", "bidirectional"),  # so are its, and its embeddings would be a unit alone
}
FUSED = "mdlm", "bd3lm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models, data and the runs of two processes on them."""
    folder = tmp_path_factory.mktemp("fsdp")
    for name, kind in MODELS.items():
        write_checkpoint(folder / name, *kind)
    write_chat(folder / "chat.jsonl")
    run_together([("finetune", [*run, "--use_cpu=False"]) for run in runs(folder)], folder, "fsdp2")
    return folder


def inputs(folder, model, name):
    return dict(model_name_or_path=folder / model, dataset=folder / "chat.jsonl", output_dir=folder / name)


def runs(folder):
    for model in MODELS:
        yield gradient_options(**inputs(folder, model, f"{model}-plain"))
        yield gradient_options(**inputs(folder, model, f"{model}-checkpointing"), gradient_checkpointing=True)
        yield gradient_options(**inputs(folder, model, f"{model}-selective"), selective_checkpointing=True)
    for model in FUSED:
        yield gradient_options(
            **inputs(folder, model, f"{model}-fused"), fused_layers=True, gradient_checkpointing=True
        )
    saved = dict(max_steps=4, save_strategy="steps", save_steps=2, bf16=True)
    yield options(**inputs(folder, "bd3lm", "whole"), **saved)
    checkpoint = folder / "whole" / "checkpoint-2"
    yield options(**inputs(folder, "bd3lm", "resumed"), **saved, resume_from_checkpoint=checkpoint)
    yield options(**inputs(folder, "bd3lm", "adapters"), lora=True, gradient_checkpointing=True, max_steps=1)


def assert_sharded(run):
    found = facts(run)
    assert found["world_size"] == 2
    assert found["distributed_type"] == "FSDP"
    assert found["wrapper"].startswith("FSDP")
    assert found["parameter_types"] == ["DTensor"]
    return found


KINDS = [(model, kind) for model in MODELS for kind in ("plain", "checkpointing", "selective")]
KINDS += [(model, "fused") for model in FUSED]


@pytest.mark.parametrize("model, kind", KINDS)
def test_gradients_are_those_of_one_process(folder, model, kind):
    run = folder / f"{model}-{kind}"
    assert assert_sharded(run)["gradient_checkpointing"] == (kind != "plain")
    one = folder / f"{model}-{kind}-one"
    finetune(gradient_options(**inputs(folder, model, one.name), per_device_train_batch_size=4))
    assert facts(one)["parameter_types"] == ["Parameter"]
    assert history(run)[0]["loss"] == pytest.approx(history(one)[0]["loss"], rel=1e-5)
    start, expected = weights(folder / model), weights(one)
    assert any((expected[name] - start[name]).abs().max() > 1e-3 for name in start)
    trained = weights(run)
    for name in trained.keys() - expected.keys():  # the head, which is the embedding, is saved with it
        assert any(torch.equal(trained[name], trained[other]) for other in expected)
    for name in expected:
        weight = trained[name]
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder):
    assert_sharded(folder / "resumed")
    for name, weight in weights(folder / "resumed").items():
        assert torch.equal(weight, weights(folder / "whole")[name]), name


def test_bfloat16_computes_over_float32_weights(folder):
    found = assert_sharded(folder / "whole")
    assert (found["mixed_precision"], found["dtypes"]) == ("bf16", ["float32"])


def test_adapters_are_trained(folder):
    found = assert_sharded(folder / "adapters")
    assert 0 < found["trained_weights"] < found["weights"]
    assert_loads(folder / "adapters", adapters=True)


@pytest.mark.parametrize("run", ["mdlm-plain", "bert-plain", "whole", "whole/checkpoint-2"])
def test_checkpoints_load(folder, run):
    assert_loads(folder / run)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_heads_that_share_their_bias_are_refused(name):
    with pytest.raises(ValueError, match=r"shares its bias with another module; use the configuration zero3"):
        choose_fsdp_units(tiny(name))


def test_fsdp_is_not_quietly_replaced_on_cpus(folder):
    command = [*launcher("fsdp2"), "-m", "dllm_train.recipes.finetune"]
    refused = subprocess.run(
        [*command, *options(**inputs(folder, "mdlm", "refused"))],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode
    assert refused.stderr.count("finetune: FSDP needs a GPU for each process") == 1
