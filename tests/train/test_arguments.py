"""Arguments of the command line, YAML and JSON, and the models, tokenizers and samplers that they name."""

import inspect
import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import HfArgumentParser

import dllm_kernels as dk
from dllm_train import (
    DataArguments,
    DiffusionTrainingArguments,
    ModelArguments,
    bd3lm_loss,
    convert,
    dream_loss,
    get_model,
    get_sampler,
    get_tokenizer,
    mdlm_loss,
)
from tests.train.tiny_models import MASK, tiny
from tests.train.trainer_runs import tokenizer

PARSER = HfArgumentParser((ModelArguments, DataArguments, DiffusionTrainingArguments))


def training(folder, **options):
    return DiffusionTrainingArguments(str(folder), use_cpu=True, **options)


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny("qwen3")
    model.config.diffusion = {"attention": ["bidirectional"], "block_size": 4}
    dk.save(model, tokenizer(), tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def test_the_command_line_yaml_and_json_say_the_same(tmp_path):
    values = {
        "output_dir": str(tmp_path), "use_cpu": True, "schedule": "cosine", "block_size": 8, "shift": False,
        "lora": True, "r": 4, "packing": True, "max_length": 64, "eval_noise_levels": [0.2, 0.8],
        "certainty_weight": 0.5,
    }  # fmt: skip
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "a.json").write_text(json.dumps(values))
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    of_words = PARSER.parse_args_into_dataclasses(words)
    for others in (PARSER.parse_yaml_file(tmp_path / "a.yaml"), PARSER.parse_json_file(tmp_path / "a.json")):
        for parsed, other in zip(of_words, others, strict=True):
            for name, value in values.items():
                assert getattr(parsed, name, value) == getattr(other, name, value) == value


def test_every_option_of_the_losses_has_an_argument_with_its_default(tmp_path):
    arguments = training(tmp_path)
    given_by_the_trainer = {
        "model", "input_ids", "labels", "noise", "example_ids", "lengths", "document_lengths", "normalizer",
        "ar_normalizer", "seed", "epoch", "reach",
    }  # fmt: skip
    of_the_model = {"mask_id", "bos_id", "shift", "block_size", "loss_weight_type"}
    for loss in (mdlm_loss, bd3lm_loss, dream_loss):
        for name, parameter in inspect.signature(loss).parameters.items():
            if name in of_the_model:
                assert getattr(arguments, name) is None
            elif name not in given_by_the_trainer:
                assert getattr(arguments, name) == parameter.default, name


WRONG = {
    "schedule": ("square", "schedule is 'square'; allowed: 'linear', 'cosine'"),
    "loss_norm_type": ("mean", "loss_norm_type is 'mean'"),
    "loss_weight_type": ("none", "loss_weight_type is 'none'"),
    "time_per": ("token", "time_per is 'token'"),
    "clean": ("full", "clean is 'full'"),
    "eps": (1.0, "eps is 1.0; expected 0 < eps < 1"),
    "cart_p": (0.0, "cart_p is 0.0"),
    "block_size": (0, "block_size is 0"),
    "per_device_train_batch_size": (0, "per_device_train_batch_size is 0; expected a number of at least 1"),
    "gradient_accumulation_steps": (0, "gradient_accumulation_steps is 0"),
    "certainty_temperature": (0.0, "certainty_temperature is 0.0; expected a number above 0"),
    "ar_weight": (0.2, "next tokens need clean='causal'"),
    "annealing_steps": (10, "annealing_length is None"),
    "annealing_length": (64, "annealing_length is 64, and annealing_steps is 0"),
    "noise_seed": (2**64, "noise_seed is 18446744073709551616; expected a number below"),
    "eval_noise_seed": (-1, "eval_noise_seed is -1"),
    "max_steps": (0, "max_steps is 0; expected a positive number, or -1"),
    "fp16": (True, "fp16=True on a CPU is not supported"),
    "eval_noise_levels": ([0.25], r"noise level is 0.25; allowed: 0.1, 0.2, … 1.0"),
    "remove_unused_columns": (True, "remove_unused_columns is not supported"),
    "logging_nan_inf_filter": (True, "logging_nan_inf_filter is not supported"),
    "label_smoothing_factor": (0.1, "label_smoothing_factor is not supported"),
    "train_sampling_strategy": ("batch_rebalance", "use 'group_by_length'"),
    "dataloader_in_order": (False, "dataloader_in_order=False is not supported"),
    "accelerator_config": ({"split_batches": True}, "split_batches is not supported"),
}


def test_a_temperature_of_certainty_that_nothing_takes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"certainty_temperature is 0\.5, and certainty_weight is 0"):
        training(tmp_path, certainty_temperature=0.5)
    assert training(tmp_path, certainty_temperature=0.5, certainty_weight=1.0).certainty_temperature == 0.5


@pytest.mark.parametrize("metric", ["loss", "eval_nll", "ppl", "ce_t0.5", "eval_short_nll"])
def test_the_best_model_is_that_of_the_lowest_bound(metric, tmp_path):
    assert training(tmp_path, metric_for_best_model=metric).greater_is_better is False
    with pytest.raises(ValueError, match=f"greater_is_better is True; {metric} is the better the lower"):
        training(tmp_path, metric_for_best_model=metric, greater_is_better=True)


def test_metrics_of_others_stay_scores(tmp_path):
    assert training(tmp_path, metric_for_best_model="accuracy").greater_is_better is True


@pytest.mark.parametrize("name", WRONG)
def test_values_that_are_none_are_refused_by_name(name, tmp_path):
    value, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        training(tmp_path, **{name: value})


def test_several_devices_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="start one for each GPU with torchrun"):
        training(tmp_path)


def test_four_bits_need_adapters_and_bitsandbytes(monkeypatch):
    with pytest.raises(ValueError, match="load_in_4bit is True without lora"):
        ModelArguments(load_in_4bit=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package bitsandbytes, which is not installed"):
        ModelArguments(load_in_4bit=True, lora=True)


def test_get_model_loads_weights_in_their_type_with_our_attention(checkpoint):
    model = get_model(ModelArguments(checkpoint))
    assert (model.dtype, model.config._attn_implementation) == (torch.float32, "dllm")
    other = get_model(ModelArguments(checkpoint, dtype="bfloat16", attn_implementation="sdpa"))
    assert (other.dtype, other.config._attn_implementation) == (torch.bfloat16, "sdpa")


def test_get_model_puts_adapters_on(checkpoint):
    model = get_model(ModelArguments(checkpoint, lora=True, r=2, target_modules="q_proj, v_proj"))
    assert isinstance(model, PeftModel)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    assert model.peft_config["default"].base_model_name_or_path == checkpoint


def test_a_checkpoint_of_stored_weights_takes_no_adapters(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "int8", weights="int8")
    with pytest.raises(ValueError, match=r"lora is True, and .*int8 stores the weights of its linear layers"):
        get_model(ModelArguments(str(tmp_path / "int8"), lora=True))


def test_get_tokenizer_is_that_of_the_checkpoint(checkpoint, tmp_path):
    assert get_tokenizer(ModelArguments(checkpoint)).mask_token_id == MASK
    assert get_tokenizer(ModelArguments("tiny-python")).mask_token_id is not None
    dk.save(dk.load(checkpoint)[0], None, tmp_path / "without")
    with pytest.raises(ValueError, match="has no tokenizer"):
        get_tokenizer(ModelArguments(str(tmp_path / "without")))


def test_a_sampler_samples_and_infills_as_dk_does(checkpoint):
    arguments = ModelArguments(checkpoint)
    model, words = dk.load(checkpoint)
    sampler = get_sampler(arguments)
    options = dict(max_new_tokens=8, block_size=4)
    found = sampler.sample([[5, 6, 7]], **options)
    expected = dk.sample(model, [[5, 6, 7]], tokenizer=words, **options)
    assert torch.equal(found.sequences, expected.sequences)
    canvas = [[5, MASK, MASK, 8]]
    assert torch.equal(
        sampler.infill(canvas, block_size=4).sequences,
        dk.infill(model, canvas, tokenizer=words, block_size=4).sequences,
    )
    training = get_sampler(arguments, model.train(), words)
    training.sample([[5, 6, 7]], **options)
    assert model.training


def test_a_sampler_of_a_function():
    def logits(ids):
        return torch.nn.functional.one_hot((ids + 1) % MASK, MASK + 1).float()

    options = dict(max_new_tokens=4, mask_id=MASK, cache="none")
    found = get_sampler(ModelArguments("unread"), logits, tokenizer()).sample([[5, 6]], **options)
    assert torch.equal(found.sequences, dk.sample(logits, [[5, 6]], **options).sequences)
