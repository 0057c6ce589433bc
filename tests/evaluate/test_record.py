"""The hash of a checkpoint: of its weights and config, wherever it is, and of a model in memory."""

import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import dllm_kernels as dk
from dllm_train.evaluate import record
from tests.evaluate.known_models import write_unigram


@pytest.fixture
def folder(tmp_path):
    return write_unigram(tmp_path / "model", {"a": 0.5})


def sha(folder) -> str:
    return record.checkpoint_hash(str(folder), None)


def test_a_copy_has_the_hash_and_other_weights_have_another(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert sha(copy) == sha(folder)
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors")
    assert sha(copy) != sha(folder)


def test_another_config_is_another_checkpoint(folder):
    before = sha(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"block_size": 8', '"block_size": 4'))
    assert sha(folder) != before


def test_an_adapter_counts_with_its_base(folder, tmp_path):
    model, _ = dk.load(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    before = sha(tmp_path / "adapter")
    assert before != sha(folder)
    write_unigram(folder, {"a": 0.25})
    assert sha(tmp_path / "adapter") != before


def test_a_model_in_memory(folder):
    model, _ = dk.load(folder)
    before = record.checkpoint_hash("no-such-folder", model)
    assert record.checkpoint_hash("no-such-folder", model) == before
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert record.checkpoint_hash("no-such-folder", model) != before


def test_a_checkpoint_that_is_not_there():
    with pytest.raises((ValueError, OSError), match="no-such-folder"):
        sha("no-such-folder")


def test_a_record_is_written_whole(tmp_path):
    made = {"dllm_record": record.FORMAT, "results": {}}
    record.write(tmp_path / "record.json", made)
    assert record.read(tmp_path / "record.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_speeds_are_no_difference():
    scores = {"task": {"exact_match,none": 0.5, "tokens_per_second,dllm": 10.0}}
    environment = dict(versions={"torch": "2"}, machine="m", commit="c")
    earlier = dict(results=scores, environment=environment)
    faster = dict(
        results={"task": {"exact_match,none": 0.5, "tokens_per_second,dllm": 20.0}}, environment=environment
    )
    assert record.differences(earlier, faster) == []
    gone = dict(results={}, environment=environment | dict(commit="d"))
    assert record.differences(earlier, gone) == [
        "task exact_match: 0.5 in the record, None now", "commit: c in the record, d now",
    ]  # fmt: skip
