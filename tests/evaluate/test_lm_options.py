"""--model_args takes every option by its name, and nothing else."""

from dataclasses import fields
from inspect import signature

import pytest

import dllm_kernels as dk
from dllm_train.evaluate import DiffusionLM
from dllm_train.evaluate.likelihood import log_likelihoods
from dllm_train.evaluate.modes import is_instruct
from dllm_train.evaluate.options import generation_options, model_options
from tests.evaluate.known_models import write_unigram
from tests.train.recipe_runs import write_tokenizer


def test_every_option_of_sampling_and_of_the_estimators_is_taken():
    sampling = {field.name: field.default for field in fields(dk.SampleConfig)}
    for name in ("chat", "history", "max_batch"):
        del sampling[name]
    asked = signature(log_likelihoods).parameters
    estimation = {name: asked[name].default for name in ("estimator", "samples", "check_greedy")}
    found = model_options(sampling | estimation | dict(likelihood_parity="llada", dtype="float16"))
    assert found.sampling == sampling
    assert found.estimation == estimation | dict(parity="llada", seed=0)
    assert found.loading == dict(dtype="float16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(treshold=0.9), "treshold is not an option of model_args; did you mean threshold"),
        (dict(qqq="low"), "qqq is not an option of model_args; allowed: add_bos_token, alg_temp"),
        (dict(chat=True), "chat is not an option of the model dllm; give --apply_chat_template"),
        (dict(max_batch=2), "give batch_size"),
        (dict(threshold=0.9, factor=1.0), "contradicts"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(batch_size="many"), "batch_size is 'many'"),
        (dict(max_length=500), "max_length is 500; the model has 256 positions"),
        (dict(pretrained=None), "pretrained is missing"),
        (dict(attention="causal"), "causal"),
        (dict(estimator="bound"), "estimator"),
        (dict(samples=0), "samples"),
        (dict(truncate="yes"), "truncate is 'yes'; it must be true or false"),
        (dict(add_bos_token=1), "add_bos_token is 1; it must be true or false"),
    ],
)
def test_mistakes_are_named(given, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        DiffusionLM(**{"pretrained": str(write_unigram(tmp_path, {"a": 0.5}))} | given)


def test_words_of_the_command_line():
    assert model_options(dict(threshold="none", dtype="auto")).sampling == dict(threshold=None)
    assert model_options(dict(threshold="none", dtype="auto")).loading == {}


def test_lengths_have_the_names_of_other_libraries_and_a_default():
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert generation_options({name: 7}, {}).new_tokens == 7
    assert generation_options({}, dict(max_new_tokens=9)).new_tokens == 9
    assert generation_options({}, {}).new_tokens == 256


def test_sampling_needs_a_temperature():
    assert generation_options(dict(do_sample=True), {}).sampling == (("temperature", 1.0),)
    assert generation_options(dict(do_sample=True), dict(temperature=0.3)).sampling == ()
    assert generation_options(dict(do_sample=False, temperature=0.7), {}).sampling == (("temperature", 0.0),)
    assert generation_options(dict(num_beams=1, until="x"), {}).until == ("x",)


@pytest.mark.parametrize(
    ("name", "template", "instruct"),
    [
        ("GSAI-ML/LLaDA-8B-Instruct", True, True),
        ("GSAI-ML/LLaDA-8B-Base", True, False),
        ("Dream-org/Dream-v0-Base-7B", True, False),
        ("models/smollm2-alpaca", True, True),
        ("tiny-python", False, False),
        ("runs/instructions", False, False),
        ("google/gemma-it", False, True),
    ],
)
def test_base_and_instruct_checkpoints(name, template, instruct, tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    if not template:
        tokenizer.chat_template = None
    assert is_instruct(name, tokenizer)[0] is instruct


def test_the_mode_is_logged_and_decides_the_estimator(tmp_path, caplog):
    base = write_unigram(tmp_path / "base", {"a": 0.5}, chat=True)
    chat = write_unigram(tmp_path / "chat", {"a": 0.5}, chat=True)
    with caplog.at_level("INFO", logger="lm_eval.dllm"):
        assert "estimator" not in DiffusionLM(str(base)).estimation
        assert DiffusionLM(str(chat)).estimation["estimator"] == "confidence"
        assert DiffusionLM(str(chat), estimator="monte_carlo").estimation["estimator"] == "monte_carlo"
        assert "estimator" not in DiffusionLM(str(chat), instruct=False).estimation
    assert "base is a base checkpoint (its name says base)" in caplog.text
    assert "chat is an instruct checkpoint (its name says chat)" in caplog.text
