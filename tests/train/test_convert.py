"""Converted checkpoints: what plain transformers makes of them, their mask token, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dllm_kernels as dk
from dllm_train import convert
from tests.train.convertible_checkpoints import CHAT, encoder_tokenizer, tokenizer, write
from tests.train.tiny_models import VOCABULARY, tiny

DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma", "gemma3", "phi3", "qwen3-moe")
MASKED = ("bert", "roberta", "modernbert", "albert")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
CHANGED = torch.tensor([[5, 6, 20, 8, 9, 10]])

# Loads checkpoints without this library; prints the logits of rows of ids for each folder.
PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
masked, ids, *folders = sys.argv[1:]
kind = AutoModelForMaskedLM if masked == "masked" else AutoModelForCausalLM
found = {}
for folder in folders:
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        found[folder] = [model.eval()(torch.tensor([row])).logits[0].tolist() for row in json.loads(ids)]
assert not any(name.startswith("dllm") for name in sys.modules)
print(json.dumps(found))
"""


def plain_logits(folders, masked=False, ids=IDS):
    command = [sys.executable, "-c", PLAIN, "masked" if masked else "causal", json.dumps(ids.tolist())]
    done = subprocess.run([*command, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {folder: torch.tensor(logits) for folder, logits in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Every decoder, and the logits of IDS and CHANGED that plain transformers gives its MDLM conversion."""
    root = tmp_path_factory.mktemp("decoders")
    models, targets = {}, {}
    for name in DECODERS:
        folder, models[name] = write(root / name, name)
        targets[name] = convert(folder, root / f"{name}-mdlm")
    found = plain_logits(targets.values(), ids=torch.cat([IDS, CHANGED]))
    return {name: (models[name], found[str(targets[name])]) for name in DECODERS}


def entries(folder):
    return json.loads((folder / "config.json").read_text())


# ---- plain transformers ------------------------------------------------------------------------------------
def test_plain_transformers_sees_whole_rows_in_converted_decoders(decoders):
    """The oracle is the source model under a dense mask that hides nothing (within its window)."""
    position = torch.arange(IDS.shape[1])
    for name, (model, found) in decoders.items():
        window = getattr(model.config, "sliding_window", None) or 99
        if name == "gemma3":  # one layer has a window and one has none, which no single dense mask says
            continue
        # transformers' dense bidirectional windows reach one token further than causal ones
        visible = (position[:, None] - position[None, :]).abs() <= window
        with torch.no_grad():
            expected = model(IDS, attention_mask=visible[None, None]).logits
        logits = found[:1, :, :VOCABULARY]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_plain_logits_of_a_converted_decoder_depend_on_later_tokens(decoders):
    for name, (model, found) in decoders.items():
        assert (found[0, 0] - found[1, 0]).abs().max() > 1e-3, name
        with torch.no_grad():
            before, after = model(IDS).logits[0, 0], model(CHANGED).logits[0, 0]
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5, msg=f"{name} was not causal")


def test_masked_lms_compute_what_they_did(tmp_path):
    made = {}
    for name in MASKED:
        folder, model = write(tmp_path / name, name)
        made[name] = model, convert(folder, tmp_path / f"{name}-chat")
    found = plain_logits([target for _, target in made.values()], masked=True)
    for name, (model, target) in made.items():
        with torch.no_grad():
            torch.testing.assert_close(found[str(target)], model(IDS).logits, rtol=1e-4, atol=1e-4)
        assert entries(target)["diffusion"]["shift"] is False, name


@pytest.mark.parametrize("name", ("llama", "qwen3", "mistral", "gpt2", "gemma"))
def test_a_block_causal_conversion_is_the_source_under_a_block_mask(name, tmp_path):
    folder, source = write(tmp_path / name, name)
    model, _ = dk.load(convert(folder, tmp_path / "out", objective="bd3lm", block_size=2))
    assert model.config.diffusion["attention"] == ["block_causal"]
    position = torch.arange(6)
    visible = position[:, None] // 2 >= position[None, :] // 2
    if (window := getattr(source.config, "sliding_window", None)) is not None:
        visible &= (position[:, None] - position[None, :]).abs() < window
    with torch.no_grad():
        expected = source(IDS, attention_mask=visible[None, None]).logits
        found = model(IDS).logits[..., :VOCABULARY]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- what is written ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_the_mask_token_gets_the_mean_of_the_rows(tied, tmp_path):
    folder, source = write(tmp_path / "source", "llama", tie_word_embeddings=tied)
    model, tokens = dk.load(convert(folder, tmp_path / "out"))
    assert tokens.mask_token == "<|mask|>"
    assert tokens.mask_token_id == model.config.mask_token_id == VOCABULARY
    assert model.config.vocab_size == VOCABULARY + 1
    for found, before in (
        (model.get_input_embeddings().weight, source.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, source.get_output_embeddings().weight),
    ):
        assert torch.equal(found[:VOCABULARY], before)
        torch.testing.assert_close(found[VOCABULARY].double(), before.double().mean(dim=0))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != tied


def test_a_padded_vocabulary_is_used_without_growing(tmp_path):
    folder, source = write(tmp_path / "source", "qwen3", vocab_size=64)
    model, tokens = dk.load(convert(folder, tmp_path / "out"))
    assert tokens.mask_token_id == VOCABULARY
    weight, before = model.get_input_embeddings().weight, source.get_input_embeddings().weight
    assert weight.shape == before.shape
    torch.testing.assert_close(weight[VOCABULARY].double(), before[:VOCABULARY].double().mean(dim=0))
    others = torch.arange(64) != VOCABULARY
    assert torch.equal(weight[others], before[others])


def test_a_special_token_that_is_not_in_use_can_be_the_mask(tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    model, tokens = dk.load(convert(folder, tmp_path / "out", mask_token="<spare>"))
    assert tokens.mask_token_id == model.config.mask_token_id == 4
    assert model.config.vocab_size == VOCABULARY


def test_a_source_without_tokenizer_gets_a_new_last_row(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "source")
    model, tokens = dk.load(convert(tmp_path / "source", tmp_path / "out"))
    assert tokens is None
    assert model.config.mask_token_id == VOCABULARY == model.config.vocab_size - 1


def test_shift_is_kept_unless_it_is_dropped(tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    assert entries(convert(folder, tmp_path / "kept"))["diffusion"]["shift"] is True
    assert entries(convert(folder, tmp_path / "dropped", shift=False))["diffusion"]["shift"] is False


def test_the_block_size_is_written_where_it_means_something(tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    sizes = {
        name: entries(convert(folder, tmp_path / name, **options))["diffusion"].get("block_size")
        for name, options in {
            "mdlm": dict(objective="mdlm"),
            "bd3lm": dict(objective="bd3lm"),
            "small": dict(objective="bd3lm", block_size=4),
        }.items()
    }
    assert sizes == {"mdlm": None, "bd3lm": 32, "small": 4}


def test_a_conversion_is_kept_and_changed_by_another(tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    first = convert(folder, tmp_path / "first", shift=False)
    again, other = convert(first, tmp_path / "again"), convert(first, tmp_path / "other", objective="bd3lm")
    assert entries(again) == entries(first)
    assert entries(other)["diffusion"] == {
        "attention": ["block_causal"], "block_size": 32, "chat": {}, "shift": False
    }  # fmt: skip
    weights = [load_file(each / "model.safetensors") for each in (first, again, other)]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]) and torch.equal(weight, weights[2][name])
    with pytest.raises(
        ValueError, match=r"mask_token is '<spare>'; this model was trained with '<\|mask\|>'"
    ):
        convert(first, tmp_path / "third", mask_token="<spare>")


def test_dtype_is_the_sources_unless_given(tmp_path):
    folder, model = write(tmp_path / "source", "llama")
    model.bfloat16().save_pretrained(folder)
    for name, dtype, expected in (("own", None, torch.bfloat16), ("half", "float16", torch.float16)):
        weights = load_file(convert(folder, tmp_path / name, dtype=dtype) / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {expected}


def test_attention_dropout_is_turned_off_since_the_losses_have_none(tmp_path):
    folder, _ = write(tmp_path / "source", "gpt2", attn_pdrop=0.1)
    assert entries(convert(folder, tmp_path / "out"))["attn_pdrop"] == 0.0


def test_chat_settings_of_the_family_are_kept(tmp_path):
    words = tokenizer(eos_token="<eos>")
    words.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    words.chat_template = CHAT + "{% if enable_thinking %}{% endif %}"
    folder, _ = write(tmp_path / "source", "qwen3", words, vocab_size=64)
    model, tokens = dk.load(convert(folder, tmp_path / "out"))
    assert tokens.chat_template == words.chat_template
    assert model.config.diffusion["chat"] == {"enable_thinking": False}
    assert model.config.eos_token_id == [2, tokens.convert_tokens_to_ids("<|im_end|>")]


def test_masked_lms_get_a_chat_template_and_an_end_token(tmp_path):
    folder, _ = write(tmp_path / "source", "bert")
    model, tokens = dk.load(convert(folder, tmp_path / "out"))
    assert (model.config.mask_token_id, model.config.eos_token_id) == (4, 2)
    messages = [{"role": "user", "content": "w9 w8"}, {"role": "assistant", "content": "w7"}]
    text = tokens.apply_chat_template(messages, tokenize=False)
    assert text == "[CLS]User: w9 w8[SEP]Assistant: w7[SEP]"
    prompt = tokens.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt.rstrip())
    output = dk.sample(model, ["w9 w8"], tokenizer=tokens, chat=True, max_new_tokens=4, block_size=4, steps=4)
    assert not (output.sequences == model.config.mask_token_id).any()


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_a_converted_model_samples(objective, tmp_path):
    folder, _ = write(tmp_path / "source", "qwen3")
    model, tokens = dk.load(convert(folder, tmp_path / "out", objective=objective, block_size=4))
    output = dk.sample(model, ["w5 w6"], tokenizer=tokens, max_new_tokens=8, steps=8)
    assert not (output.sequences == model.config.mask_token_id).any()


# ---- refused mask tokens -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("<eos>", "token 2, which is the eos token"),
        ("<pad>", "token 0, which is the pad token"),
        ("<bos>", "token 1, which is the bos token"),
        ("<unk>", "token 3, which is the unk token"),
        ("w9", r"which is a word of the vocabulary \(token 9\)"),
        ("", "it must be a text or None"),
    ],
)
def test_a_mask_token_with_another_meaning_is_refused(token, reason, tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    with pytest.raises((ValueError, TypeError), match=reason):
        convert(folder, tmp_path / "out", mask_token=token)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_whose_mask_token_is_its_end_token_is_refused(tmp_path):
    folder, _ = write(tmp_path / "source", "llama", tokenizer(mask_token="<eos>"))
    with pytest.raises(ValueError, match="mask_token is '<eos>', token 2, which is the eos token"):
        convert(folder, tmp_path / "out")
    assert dk.load(convert(folder, tmp_path / "out", mask_token="<|mask|>"))[1].mask_token == "<|mask|>"


def test_a_mask_token_that_the_config_ends_texts_with_is_refused(tmp_path):
    folder, _ = write(tmp_path / "source", "llama", eos_token_id=4)
    with pytest.raises(ValueError, match="mask_token is '<spare>', token 4, which is the eos token"):
        convert(folder, tmp_path / "out", mask_token="<spare>")


def test_a_mask_token_that_ends_the_familys_replies_is_refused(tmp_path):
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    folder, _ = write(tmp_path / "source", "qwen3", words, vocab_size=64)
    with pytest.raises(ValueError, match=r"mask_token is '<\|im_end\|>', token 48, which is the eos token"):
        convert(folder, tmp_path / "out", mask_token="<|im_end|>")


def test_a_mask_token_that_the_chat_template_writes_is_refused(tmp_path):
    words = tokenizer()
    words.chat_template = CHAT.replace("<eos>", "<spare>")
    folder, _ = write(tmp_path / "source", "llama", words)
    with pytest.raises(ValueError, match="mask_token is '<spare>', which the chat template writes"):
        convert(folder, tmp_path / "out", mask_token="<spare>")


def test_a_masked_lm_keeps_its_mask_token(tmp_path):
    folder, _ = write(tmp_path / "source", "bert")
    with pytest.raises(ValueError, match=r"mask_token is '\[NEW\]'; this model was trained with '\[MASK\]'"):
        convert(folder, tmp_path / "out", mask_token="[NEW]")
    nameless = encoder_tokenizer()
    nameless.mask_token = None
    folder, _ = write(tmp_path / "nameless", "bert", nameless)
    with pytest.raises(ValueError, match="neither the config nor the tokenizer names"):
        convert(folder, tmp_path / "out")
    assert dk.load(convert(folder, tmp_path / "out", mask_token="[MASK]"))[0].config.mask_token_id == 4


def test_a_tokenizer_that_would_come_back_as_another_one_is_refused(tmp_path):
    """transformers reads every tokenizer of a qwen2 model as Qwen2's, which has no words split by spaces."""
    folder, _ = write(tmp_path / "source", "qwen2")
    with pytest.raises(ValueError, match="come back from its files as a Qwen2Tokenizer"):
        convert(folder, tmp_path / "out", tokenizer=tokenizer())
    assert not (tmp_path / "out").exists()


# ---- refused sources, targets and options ------------------------------------------------------------------
def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.up_proj.weight"):
        convert(folder, tmp_path / "out")
    weights |= {"model.layers.1.mlp.up_proj.weight": lost, "model.layers.9.mlp.up_proj.weight": lost.clone()}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: model.layers.9.mlp.up_proj.weight"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_targets_in_use_are_refused(tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    with pytest.raises(ValueError, match="where the source is"):
        convert(folder, folder, overwrite=True)
    target = convert(folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True replaces"):
        convert(folder, target)
    (target / "notes.txt").write_text("mine")
    convert(folder, target, objective="bd3lm", overwrite=True)
    assert entries(target)["diffusion"]["attention"] == ["block_causal"]
    assert (target / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="which is a file"):
        convert(folder, tmp_path / "file", overwrite=True)


def test_an_interrupted_conversion_leaves_what_was_there(tmp_path, monkeypatch):
    folder, _ = write(tmp_path / "source", "llama")
    target = convert(folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(tokenizer()), "save_pretrained", full_disk)
    for place in (target, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            convert(folder, place, objective="bd3lm", overwrite=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(objective="ar"), "objective is 'ar'; allowed: 'mdlm', 'bd3lm', None"),
        (dict(block_size=0), "block_size must lie in 1"),
        (dict(shift="yes"), "shift is a str"),
        (dict(dtype="int8"), "dtype is 'int8'"),
        (dict(chat_template="{% for"), "chat_template cannot be filled in"),
        (dict(chat_template="chatml"), "chat_template leaves out what the messages say"),
        (dict(layout="llama9"), "layout is 'llama9'"),
    ],
)
def test_options_that_are_none_are_refused(options, reason, tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    with pytest.raises((ValueError, TypeError), match=reason):
        convert(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_architecture_without_attention_masks_is_refused(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="MambaForCausalLM computes causal attention whatever mask"):
        convert(tmp_path / "source", tmp_path / "out")


def test_plain_transformers_continues_texts_with_the_source_as_before(tmp_path):
    """The conversion marks a copy: the source folder stays as it was."""
    folder, model = write(tmp_path / "source", "llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    convert(folder, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, model(IDS).logits)
