"""Adapters as sources of conversions, and the tool that merges them."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import dllm_kernels as dk
from dllm_kernels.cli import app
from dllm_train import ModelArguments, convert, get_model, get_sampler, get_tokenizer, merge_adapter
from tests.train.convertible_checkpoints import write
from tests.train.tiny_models import VOCABULARY

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture
def causal(tmp_path):
    """An adapter of a causal LM, and the logits that peft computes with it."""
    folder, _ = write(tmp_path / "source", "llama")
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LORA).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", adapted(input_ids=IDS).logits


@pytest.fixture
def diffusion(tmp_path):
    """An adapter of an MDLM checkpoint, saved with a trained row of its mask token."""
    folder, _ = write(tmp_path / "source", "llama")
    model, tokenizer = dk.load(convert(folder, tmp_path / "base"), device="cpu")
    torch.manual_seed(0)
    rows = {"embed_tokens": [VOCABULARY]}
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                weight.add_(1)
        logits = adapted(input_ids=torch.tensor([[5, VOCABULARY, 7]])).logits
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits


def test_an_adapter_of_a_causal_lm_is_merged_and_stays_causal(causal, tmp_path):
    adapter, expected = causal
    target = merge_adapter(adapter, tmp_path / "merged")
    entries = json.loads((target / "config.json").read_text())
    assert "diffusion" not in entries and "is_causal" not in entries
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(target)(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_causal_lm_is_converted(causal, tmp_path):
    """The oracle is the merged model under a block mask."""
    adapter, _ = causal
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(adapter, tmp_path / "merged"))
    target = convert(adapter, tmp_path / "bd3lm", objective="bd3lm", block_size=3)
    visible = torch.arange(6)[:, None] // 3 >= torch.arange(6)[None, :] // 3
    with torch.no_grad():
        expected = merged(IDS, attention_mask=visible[None, None]).logits
        logits = dk.load(target, device="cpu")[0](IDS).logits[..., :VOCABULARY]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_merge_command_writes_what_dk_load_and_plain_transformers_read(diffusion, tmp_path):
    adapter, expected = diffusion
    target = tmp_path / "merged"
    done = CliRunner().invoke(app, ["merge", str(adapter), str(target)])
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{target}\n"
    ids = torch.tensor([[5, VOCABULARY, 7]])
    for model in (dk.load(target, device="cpu")[0], AutoModelForCausalLM.from_pretrained(target)):
        assert type(model).__name__ == "LlamaForCausalLM"
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_sample_command_takes_an_adapter(diffusion):
    adapter, _ = diffusion
    arguments = ["sample", "w5 w6", "--model", str(adapter), "--max-new-tokens", "4", "--steps", "4"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "4 forwards" in done.stderr


def test_the_training_arguments_take_an_adapter(diffusion, tmp_path):
    adapter, _ = diffusion
    arguments = ModelArguments(str(adapter))
    assert get_tokenizer(arguments).mask_token_id == VOCABULARY
    assert type(get_model(arguments)).__name__ == "LlamaForCausalLM"
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    assert get_tokenizer(arguments).mask_token_id == VOCABULARY, "of the base model"
    output = get_sampler(arguments).sample(["w5 w6"], max_new_tokens=4, steps=4)
    assert not (output.sequences == VOCABULARY).any()


@pytest.mark.parametrize("use", [merge_adapter, convert])
def test_a_base_that_is_not_there_is_named(use, causal, tmp_path):
    adapter, _ = causal
    (tmp_path / "source").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"is an adapter of '.*source': .*; base= names another"):
        use(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert use(adapter, tmp_path / "out", base=tmp_path / "moved") == tmp_path / "out"


def test_targets_and_sources_that_are_none_are_refused(causal, tmp_path):
    adapter, _ = causal
    with pytest.raises(ValueError, match=r"target is .*adapter, where the adapter is"):
        merge_adapter(adapter, adapter, overwrite=True)
    with pytest.raises(ValueError, match="which holds a whole model and no peft adapter"):
        merge_adapter(tmp_path / "source", tmp_path / "out")
    with pytest.raises(ValueError, match="is a whole model and no adapter"):
        convert(tmp_path / "source", tmp_path / "out", base=tmp_path / "source")
    failed = CliRunner().invoke(app, ["merge", str(tmp_path / "none"), str(tmp_path / "out")])
    assert failed.exit_code == 2 and failed.stderr.startswith("dllm: there is no model named")
