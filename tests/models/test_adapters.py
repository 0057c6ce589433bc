"""Folders with peft adapters are read wherever a checkpoint is, and compute what peft computes."""

import json
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import dllm_kernels as dk
from dllm_train import convert
from tests.train.convertible_checkpoints import write
from tests.train.tiny_models import VOCABULARY

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, VOCABULARY]])
LORA = dict(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """MDLM conversions of a tiny Llama, its embeddings tied and not."""
    root = tmp_path_factory.mktemp("bases")
    found = {}
    for tied in (True, False):
        folder, _ = write(root / f"source-{tied}", "llama", tie_word_embeddings=tied)
        found[tied] = convert(folder, root / f"base-{tied}")
    return found


def trained(base, folder, **options):
    """Save an adapter with random weights in `folder`; return the logits that peft computes with it."""
    torch.manual_seed(3)
    model, tokenizer = dk.load(base, device="cpu")
    adapted = get_peft_model(model, LoraConfig(**LORA | options)).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))
        logits = adapted(input_ids=IDS).logits
    adapted.save_pretrained(folder)
    if options.get("with_tokenizer"):
        tokenizer.save_pretrained(folder)
    return logits


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, dict()),
        (True, dict(use_dora=True)),
        (True, dict(target_modules=["q_proj", "embed_tokens"])),
        (True, dict(modules_to_save=["embed_tokens"])),
        (False, dict(modules_to_save=["lm_head"])),
        (False, dict(modules_to_save=["embed_tokens", "lm_head"])),
        (True, dict(trainable_token_indices={"embed_tokens": [VOCABULARY]})),
        (False, dict(bias="all", task_type="CAUSAL_LM")),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else f"tied={value}",
)
def test_a_loaded_adapter_computes_what_peft_computed(tied, options, bases, tmp_path):
    expected = trained(bases[tied], tmp_path / "adapter", **options)
    model, tokenizer = dk.load(tmp_path / "adapter", device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM" and not any("lora" in n for n in model.state_dict())
    assert tokenizer.mask_token_id == model.config.mask_token_id == VOCABULARY
    assert model.config.diffusion["attention"] == ["bidirectional"]
    assert all(weight.requires_grad for weight in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    dk.save(model, tokenizer, tmp_path / "merged")
    again, _ = dk.load(tmp_path / "merged", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_names_the_checkpoint_that_dk_load_read(bases, tmp_path):
    trained(bases[True], tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases[True])


def test_an_adapter_of_an_adapter(bases, tmp_path):
    trained(bases[True], tmp_path / "first")
    expected = trained(tmp_path / "first", tmp_path / "second")
    with torch.no_grad():
        logits = dk.load(tmp_path / "second", device="cpu")[0](IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_grew_the_vocabulary(bases, tmp_path):
    torch.manual_seed(3)
    model, tokenizer = dk.load(bases[False], device="cpu")
    tokenizer.add_tokens(["more", "words"])
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(**LORA)).eval()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, VOCABULARY + 1, VOCABULARY + 2]])
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
    loaded, words = dk.load(tmp_path / "adapter", device="cpu")
    assert loaded.config.vocab_size == VOCABULARY + 3 and words("more").input_ids == [VOCABULARY + 1]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_sampled_with_merged_projections(bases, tmp_path):
    expected = trained(bases[True], tmp_path / "adapter")
    model, tokenizer = dk.load(tmp_path / "adapter", device="cpu", merge_projections=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    output = dk.sample(model, ["w5 w6"], tokenizer=tokenizer, max_new_tokens=8, steps=4)
    assert not (output.sequences == VOCABULARY).any()


def test_a_base_that_moved_is_given(bases, tmp_path):
    shutil.copytree(bases[True], tmp_path / "base")
    expected = trained(tmp_path / "base", tmp_path / "adapter")
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ValueError, match=r"is an adapter of '.*base', which is not found .*; give base="):
        dk.load(tmp_path / "adapter")
    model, _ = dk.load(tmp_path / "adapter", base=tmp_path / "moved", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="is a whole model and no adapter"):
        dk.load(tmp_path / "moved", base=tmp_path / "moved")


def test_another_base_is_refused(bases, tmp_path):
    trained(bases[True], tmp_path / "adapter")
    for name, entries in (("wider", dict(hidden_size=32)), ("shorter", dict(num_hidden_layers=1))):
        other = convert(write(tmp_path / name, "llama", **entries)[0], tmp_path / f"{name}-mdlm")
        with pytest.raises(ValueError, match=r"the adapter of .*adapter does not fit this LlamaForCausalLM"):
            dk.load(tmp_path / "adapter", base=other)
    source, _ = write(tmp_path / "causal", "llama")
    with pytest.raises(ValueError, match=r'config\.json has no "diffusion" entry'):
        dk.load(tmp_path / "adapter", base=source)


def test_adapters_that_are_not_whole_are_refused(bases, tmp_path):
    folder = tmp_path / "adapter"
    trained(bases[True], folder)
    weights = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in weights if "layers.1" in name)
    save_file({n: w for n, w in weights.items() if n != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit.* missing: .*layers\.1"):
        dk.load(folder)
    save_file({**weights, lost.replace("layers.1", "layers.7"): weights[lost].clone()},
              folder / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"does not fit.* unexpected: .*layers\.7"):
        dk.load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the adapter of .* does not fit"):
        dk.load(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base_model_name_or_path None; name the model with base="):
        dk.load(folder)
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(folder)})
    )
    with pytest.raises(ValueError, match="names itself as its base model"):
        dk.load(folder)


def test_a_folder_with_a_model_and_an_adapter_is_refused(bases, tmp_path):
    shutil.copytree(bases[True], tmp_path / "both")
    trained(bases[True], tmp_path / "both")
    with pytest.raises(ValueError, match="holds a whole model and a peft adapter"):
        dk.load(tmp_path / "both")


def test_a_learned_prompt_is_refused(bases, tmp_path):
    model, _ = dk.load(bases[True], device="cpu")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"holds a learned prompt \(PROMPT_TUNING\)"):
        dk.load(tmp_path / "prompt")


def test_without_peft_the_error_names_it(bases, tmp_path, monkeypatch):
    trained(bases[True], tmp_path / "adapter")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="holds a peft adapter; install the package peft"):
        dk.load(tmp_path / "adapter")
