"""The recipes in one process: files of options, resumption, and bad input in one line with code 2."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from dllm_train.recipes import launch
from dllm_train.recipes.finetune import finetune
from dllm_train.recipes.pretrain import pretrain
from tests.train.recipe_runs import (
    environment,
    facts,
    history,
    launcher,
    options,
    weights,
    write_chat,
    write_checkpoint,
    write_documents,
)
from tests.train.saved_checkpoints import assert_loads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    write_checkpoint(folder / "mdlm")
    write_checkpoint(folder / "bd3lm", "qwen3", "block_causal")
    write_chat(folder / "chat.jsonl")
    write_documents(folder / "documents.jsonl")
    return folder


@pytest.fixture
def inputs(folder, tmp_path):
    """The options that every run needs."""
    return dict(
        model_name_or_path=folder / "mdlm",
        dataset=folder / "chat.jsonl",
        output_dir=tmp_path / "run",
        max_steps=1,
    )


@pytest.mark.parametrize("model", ["mdlm", "bd3lm"])
def test_the_objective_is_that_of_the_checkpoint(folder, inputs, model):
    finetune(options(**inputs | dict(model_name_or_path=folder / model)))
    assert facts(inputs["output_dir"])["objective"] == model


def test_dream_is_an_objective_of_bidirectional_models(inputs):
    finetune(options(**inputs, objective="dream"))
    assert facts(inputs["output_dir"])["objective"] == "dream"
    assert_loads(inputs["output_dir"])


def test_options_come_from_a_file_and_the_command_line_wins(inputs, tmp_path):
    entries = {name: str(value) for name, value in inputs.items()} | dict(
        max_length=32,
        report_to="none",
        save_strategy="no",
        max_steps=3,
        logging_steps=1,
        eval_noise_levels=[0.5],
    )
    for file, text in (("run.yaml", yaml.safe_dump(entries)), ("run.json", json.dumps(entries))):
        (tmp_path / file).write_text(text)
        finetune([str(tmp_path / file), "--max_steps", "2"])
        assert history(inputs["output_dir"])[-1]["step"] == 2


def test_the_last_checkpoint_or_none_is_gone_on_from(inputs):
    saving = inputs | dict(save_strategy="steps", save_steps=1, lr_scheduler_type="constant")
    resumed = saving | dict(resume_from_checkpoint="last")
    finetune(options(**resumed))
    assert history(inputs["output_dir"])[-1]["step"] == 1
    finetune(options(**resumed | dict(max_steps=2)))
    finetune(options(**saving | dict(max_steps=2, output_dir=inputs["output_dir"].parent / "whole")))
    for name, weight in weights(inputs["output_dir"].parent / "whole").items():
        assert weight.equal(weights(inputs["output_dir"])[name])


def test_a_new_run_does_not_mix_with_checkpoints_of_another(inputs):
    saving = options(**inputs | dict(save_strategy="steps", save_steps=1))
    finetune(saving)
    with pytest.raises(
        ValueError, match=r"holds checkpoint-1 of an earlier run; .*resume_from_checkpoint last"
    ):
        finetune(saving)


def test_a_test_split_is_evaluated(folder, inputs):
    split = f"{folder / 'chat.jsonl'}[train:12,test:4]"
    finetune(options(**inputs | dict(dataset=split), do_eval=True))
    figures = json.loads((inputs["output_dir"] / "eval_results.json").read_text())
    assert figures["eval_nll"] > 0


def test_a_preprocessed_dataset_is_trained_on(folder, inputs, tmp_path):
    from dllm_train.preprocess import PreprocessArguments, preprocess

    rows = dict(dataset=str(folder / "chat.jsonl"), tokenizer=str(folder / "mdlm"), max_length=32)
    preprocess(PreprocessArguments(output=str(tmp_path / "rows"), **rows))
    finetune(options(**inputs | dict(dataset="", preprocessed=tmp_path / "rows")))
    finetune(options(**inputs | dict(output_dir=tmp_path / "direct")))
    for name, weight in weights(tmp_path / "direct").items():
        assert weight.equal(weights(inputs["output_dir"])[name])


@pytest.mark.parametrize("streaming", [False, True])
def test_pretraining_goes_on_from_a_checkpoint(folder, inputs, streaming):
    documents = dict(dataset=folder / "documents.jsonl", packing=True, streaming=streaming)
    pretrain(options(**inputs | documents))
    assert_loads(inputs["output_dir"])


def test_weights_from_scratch_are_those_of_the_seed(folder, inputs, tmp_path):
    config = write_checkpoint(tmp_path / "shape")
    (config / "model.safetensors").unlink()
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        given = dict(
            model_name_or_path=config, output_dir=tmp_path / name, dataset=folder / "documents.jsonl"
        )
        pretrain(options(**inputs | given, from_scratch=True, seed=seed, data_seed=0, learning_rate=1e-8))
        made.append(weights(tmp_path / name)["model.embed_tokens.weight"])
    assert made[0].equal(made[1])
    assert not made[0].equal(made[2])


BAD = {
    "an unknown option": (dict(learning_rat=1), "unknown options: --learning_rat=1"),
    "an abbreviated option": (dict(learn=1), "unknown options: --learn=1"),
    "text for a number": (dict(max_length="long"), "max_length.*invalid int value: 'long'"),
    "another objective": (dict(objective="ar"), "objective.*'ar'"),
    "an objective of other attention": (
        dict(objective="bd3lm"),
        "BD3LMTrainer trains block_causal attention",
    ),
    "a model that is not there": (dict(model_name_or_path="missing/folder"), "'missing/folder'"),
    "a dataset that is not there": (dict(dataset="missing.jsonl"), "'missing.jsonl'"),
    "no dataset": (dict(dataset=""), "give one of them"),
    "two datasets": (dict(preprocessed="rows"), "give one of them"),
    "an empty split": (dict(dataset="CHAT[train:0]"), "train"),
    "blocks longer than rows": (dict(model="bd3lm", block_size=64), "max_length is 32.* block_size, 64"),
    "blocks that do not divide rows": (
        dict(model="bd3lm", block_size=12),
        "max_length is 32.* block_size, 12",
    ),
    "a block size without blocks": (dict(block_size=8), "block_size is 8"),
    "padding that does not divide rows": (
        dict(pad_to_multiple_of=24),
        "pad_to_multiple_of is 24; expected a divisor of max_length, 32",
    ),
    "padding to parts of blocks": (
        dict(model="bd3lm", block_size=8, pad_to_multiple_of=4),
        "is 4; expected .* and a multiple of block_size, 8",
    ),
    "a checkpoint that is not there": (
        dict(resume_from_checkpoint="missing"),
        "'missing', which is not a folder",
    ),
    "4 bits without adapters": (dict(load_in_4bit=True), "load_in_4bit"),
    "text for replies": (dict(dataset="DOCUMENTS"), "documents.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2(folder, inputs, name, monkeypatch, capsys):
    given, reason = BAD[name]
    given = dict(given)
    if "model" in given:
        given["model_name_or_path"] = folder / given.pop("model")
    for word, file in (("CHAT", "chat.jsonl"), ("DOCUMENTS", "documents.jsonl")):
        if word in given.get("dataset", ""):
            given["dataset"] = given["dataset"].replace(word, str(folder / file))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        launch.run(finetune, options(**inputs | given))
    assert ended.value.code == 2
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line.startswith("finetune: ")
    assert re.search(reason, line), line
    assert not (inputs["output_dir"] / "model.safetensors").exists()


def test_adapters_and_random_weights_exclude_each_other(inputs):
    with pytest.raises(ValueError, match="from_scratch is True, and so is lora"):
        pretrain(options(**inputs, from_scratch=True, lora=True))


def test_a_file_that_holds_no_options_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("- max_steps\n")
    with pytest.raises(ValueError, match=r"run.yaml holds a list; expected options by name"):
        finetune([str(tmp_path / "run.yaml")])


def test_a_mistake_is_named_once_by_two_processes_and_neither_waits(inputs):
    command = [
        *launcher(),
        "-m",
        "dllm_train.recipes.finetune",
        *options(**inputs | dict(dataset="missing.jsonl")),
    ]
    failed = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert failed.returncode
    assert failed.stderr.count("'missing.jsonl'") == 1
    assert "finetune: " in failed.stderr
