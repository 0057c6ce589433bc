"""The recipes in one process: files of options, resumption, and bad input in one line with code 2."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

import dllm_kernels as dk
from dllm_train import DataArguments
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


def test_rows_of_a_preprocessed_folder_are_padded_as_they_were_cut(folder, inputs, tmp_path):
    from dllm_train.preprocess import PreprocessArguments, preprocess

    rows = dict(dataset=str(folder / "chat.jsonl"), tokenizer=str(folder / "mdlm"), max_length=30)
    preprocess(PreprocessArguments(output=str(tmp_path / "rows"), **rows))
    given = inputs | dict(dataset="", preprocessed=tmp_path / "rows", max_length=DataArguments.max_length)
    finetune(options(**given))
    finetune(options(**inputs | dict(output_dir=tmp_path / "direct", max_length=30)))
    for name, weight in weights(tmp_path / "direct").items():
        assert weight.equal(weights(inputs["output_dir"])[name])
    for name, value in dict(max_length=32, train_on="last", insert_eos=False).items():
        with pytest.raises(ValueError, match=f"{name} is {value!r}, and .*rows' was made with "):
            finetune(options(**given | {name: value}))


def test_adapters_over_four_bits_begin_at_the_loss_of_the_rounded_weights(inputs, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    source = write_checkpoint(tmp_path / "whole", hidden_size=64, intermediate_size=64)
    model, tokenizer = dk.load(source)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            packed = functional.quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
            layer.weight.data = functional.dequantize_4bit(*packed)
    dk.save(model, tokenizer, tmp_path / "rounded")
    logged = []
    for name, bits in ((tmp_path / "rounded", {}), (source, dict(load_in_4bit=True))):
        run = tmp_path / f"of-{name.name}"
        given = inputs | dict(model_name_or_path=name, output_dir=run, logging_steps=1, lora_dropout=0.0)
        finetune(options(**given | bits, lora=True))
        logged.append(history(run)[0]["loss"])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
    assert "Params4bit" in facts(run)["parameter_types"]
    assert_loads(run, adapters=True)


def test_options_of_replies_are_no_options_of_documents(folder, inputs):
    with pytest.raises(ValueError, match="train_on is 'last'; it has no effect on pretraining rows"):
        pretrain(options(**inputs | dict(dataset=folder / "documents.jsonl"), train_on="last"))


def test_evaluation_may_leave_noise_levels_out(folder, inputs, tmp_path):
    (tmp_path / "run.yaml").write_text("eval_noise_levels: []\n")
    given = inputs | dict(dataset=f"{folder / 'chat.jsonl'}[train:12,test:4]", do_eval=True)
    words = options(**given)
    for run in ([str(tmp_path / "run.yaml"), *words], [*words, "--eval_noise_levels"]):
        finetune(run)
        figures = json.loads((inputs["output_dir"] / "eval_results.json").read_text())
        assert figures["eval_nll"] > 0
        assert not [name for name in figures if name.startswith("eval_ce")]


def test_a_finished_run_that_is_started_again_is_left_as_it_is(inputs):
    saving = options(**inputs | dict(save_strategy="steps", save_steps=1, resume_from_checkpoint="last"))
    finetune(saving)
    before = weights(inputs["output_dir"])
    finetune(saving)
    assert history(inputs["output_dir"])[-1]["step"] == 1
    for name, weight in weights(inputs["output_dir"]).items():
        assert weight.equal(before[name])


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
    "an option of documents": (dict(packing=True), "packing is True; it has no effect on sft rows"),
    "evaluation without a test split": (dict(do_eval=True), "do_eval is True, and .* has no test split"),
    "an unknown metric": (
        dict(metric_for_best_model="accuracy"),
        "metric_for_best_model is 'accuracy'; evaluation reports loss, nll, ppl, ce_t0.1",
    ),
    "no steps": (dict(max_steps=0), "max_steps is 0"),
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
