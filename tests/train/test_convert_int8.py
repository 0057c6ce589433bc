"""`convert(weights=...)`: checkpoints whose linear layers store their weights in fewer bytes."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import dllm_kernels as dk
from dllm_kernels.cli import app
from dllm_kernels.models.stored_weights import StoredLinear, store_tied_head
from dllm_kernels.ops.skinny_linear import dequantize_weight
from dllm_train import convert
from dllm_train.conversion.mask_token import add_mask_token
from dllm_train.conversion.sources import read_source
from tests.train.convertible_checkpoints import write
from tests.train.gguf_files import paired, write_gguf
from tests.train.tiny_models import tiny

SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)


def llama(**more):
    return tiny("llama", **SIZES, **more)


def q8_0(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the gguf package makes of a weight [out, in]: int8 [out, in], scales [out, in / 32]."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(weight.detach().numpy(), kind).reshape(len(weight), -1, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    whole = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(len(weight), -1)
    return torch.from_numpy(whole), torch.from_numpy(scales)


def stored_layers(model) -> dict[str, StoredLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, StoredLinear)}


# ---- GGUF --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_q8_0_layers_keep_the_bytes_of_the_file(tied, tmp_path):
    source = llama(tie_word_embeddings=tied)
    model, _ = read_source(write_gguf(tmp_path / "m.gguf", source, tied=tied, kind="Q8_0"), weights="int8")
    layers = stored_layers(model)
    assert len(layers) == 7 * source.config.num_hidden_layers + (not tied)
    for name, layer in layers.items():
        expected = q8_0(source.get_submodule(name).weight)  # rows permuted there and back
        assert all(part.equal(own) for part, own in zip(layer.parts(), expected, strict=True))
    embedding = dequantize_weight(*q8_0(source.model.embed_tokens.weight))
    assert model.model.embed_tokens.weight.equal(embedding)
    assert not tied or model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight.equal(source.model.norm.weight) and not model.training


def test_rows_of_queries_and_keys_are_in_the_order_of_transformers(tmp_path):
    source = llama()
    file = write_gguf(tmp_path / "m.gguf", source, kind="Q8_0")
    model, _ = read_source(file, weights="int8")
    whole, _ = read_source(file)  # by transformers, in float32
    for name, layer in stored_layers(model).items():
        assert dequantize_weight(*layer.parts()).equal(whole.get_submodule(name).weight)
    weight = source.model.layers[0].self_attn.q_proj.weight
    assert not paired(weight, 4).equal(weight)


@pytest.mark.parametrize(("arch", "head_dim"), [("qwen2", 16), ("qwen3", 128)])  # as their configs have it
def test_qwen_files_are_read_as_transformers_reads_them(arch, head_dim, tmp_path):
    source = tiny(arch, **SIZES, head_dim=head_dim)
    file = write_gguf(tmp_path / "m.gguf", source, kind="Q8_0", arch=arch)
    model, _ = read_source(file, weights="int8")
    whole, _ = read_source(file)
    layers = stored_layers(model)
    assert len(layers) == 15 and all(layer.stored_dtype == torch.int8 for layer in layers.values())
    for name, layer in layers.items():
        assert dequantize_weight(*layer.parts()).equal(whole.get_submodule(name).weight)
    floats = dict(whole.named_parameters())
    assert all(parameter.equal(floats[name]) for name, parameter in model.named_parameters())
    assert model.config.to_diff_dict() == whole.config.to_diff_dict()


def test_layers_in_other_formats_are_rounded(tmp_path):
    source = llama()
    file = write_gguf(tmp_path / "m.gguf", source, kind="Q8_0", within=["up_proj"])
    model, _ = read_source(file, weights="int8")
    assert model.model.layers[0].mlp.up_proj.parts()[1].shape == (96, 2)
    for name in ("mlp.gate_proj", "self_attn.q_proj"):
        expected = dk.quantize_weight(source.model.layers[0].get_submodule(name).weight)
        parts = model.model.layers[0].get_submodule(name).parts()
        assert all(part.equal(own) for part, own in zip(parts, expected, strict=True))
    without = write_gguf(tmp_path / "f.gguf", source)
    assert len(stored_layers(read_source(without, weights="int8")[0])) == len(stored_layers(model))
    four_bits = write_gguf(tmp_path / "4.gguf", source, kind="Q4_0")
    layer = read_source(four_bits, weights="bfloat16")[0].model.layers[0].mlp.up_proj
    assert layer.stored_dtype == torch.bfloat16


def test_q8_0_files_that_are_not_whole_are_refused(tmp_path):
    source = llama()
    missing = write_gguf(tmp_path / "m.gguf", source, "model.layers.1.mlp.up_proj.weight", kind="Q8_0")
    with pytest.raises(ValueError, match=r"m\.gguf cannot be read .*missing: model\.layers\.1\.mlp\.up_proj"):
        read_source(missing, weights="int8")
    more = write_gguf(tmp_path / "r.gguf", source, kind="Q8_0", rope_freqs__weight=np.zeros(8, np.float32))
    with pytest.raises(ValueError, match=r"unexpected: rope_freqs\.weight"):
        read_source(more, weights="int8")
    narrow = tiny("llama", **{**SIZES, "intermediate_size": 64})
    narrow.config.intermediate_size = 96
    with pytest.raises(ValueError, match=r"ffn_gate\.weight is \[64, 64\], not \[96, 64\]"):
        read_source(write_gguf(tmp_path / "n.gguf", narrow, kind="Q8_0"), weights="int8")
    file = write_gguf(tmp_path / "cut.gguf", source, kind="Q8_0")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"cut\.gguf cannot be read"):
        read_source(file, weights="int8")


def test_the_head_keeps_the_bytes_of_its_rows_beside_the_mask_token(tmp_path):
    source = llama()
    file = write_gguf(tmp_path / "m.gguf", source, kind="Q8_0")
    model, _ = dk.load(convert(file, tmp_path / "out", weights="int8"), device="cpu")
    parts, expected = model.lm_head.parts(), q8_0(source.lm_head.weight)
    assert model.config.mask_token_id == len(parts[0]) - 1 >= len(expected[0])
    assert all(part[: len(own)].equal(own) for part, own in zip(parts, expected, strict=True))
    mean = dequantize_weight(*expected).mean(dim=0)
    row = dequantize_weight(*(part[-1:] for part in parts))[0]
    torch.testing.assert_close(row, mean, atol=float(mean.abs().max()) / 127, rtol=0)


def test_loading_a_gguf_file_says_how_to_convert_it(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", llama(), kind="Q8_0")
    with pytest.raises(ValueError, match=r"m\.gguf is a GGUF file; dllm convert m\.gguf FOLDER makes"):
        dk.load(file)


def test_a_q8_0_file_becomes_an_int8_checkpoint_that_samples(tmp_path):
    source = llama()
    file = write_gguf(tmp_path / "m.gguf", source, kind="Q8_0")
    target = convert(file, tmp_path / "out", objective="bd3lm", block_size=4, weights="int8")
    group = json.loads((target / "config.json").read_text())["quantization_config"]["config_groups"]
    assert group["group_0"]["weights"]["group_size"] == 32
    model, tokenizer = dk.load(target, device="cpu")
    name = "model.layers.1.self_attn.k_proj"
    parts, expected = model.get_submodule(name).parts(), q8_0(source.get_submodule(name).weight)
    assert all(part.equal(own) for part, own in zip(parts, expected, strict=True))
    whole, _ = dk.load(target, device="cpu", weights="float32")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        logits, exact = model(ids).logits, whole(ids).logits
    assert float((logits - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert dk.sample(model, "abc", tokenizer=tokenizer, max_new_tokens=8).lengths[0] > 0


# ---- other sources -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("pickled", [False, True])
def test_checkpoints_become_int8(pickled, tmp_path):
    folder, source = write(tmp_path / "source", "llama")
    if pickled:
        torch.save(source.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    model, _ = dk.load(convert(folder, tmp_path / "out", weights="int8"), device="cpu")
    name = "model.layers.0.mlp.up_proj"
    expected = dk.quantize_weight(source.get_submodule(name).weight)
    parts = model.get_submodule(name).parts()
    assert all(part.equal(own) for part, own in zip(parts, expected, strict=True))


def test_an_int8_checkpoint_stays_so(tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    small = convert(folder, tmp_path / "small", weights="int8")
    again = convert(small, tmp_path / "again", objective="bd3lm", block_size=4)
    before, after = (stored_layers(dk.load(place, device="cpu")[0]) for place in (small, again))
    assert before.keys() == after.keys() and before
    for name, layer in before.items():
        assert all(a.equal(b) for a, b in zip(layer.parts(), after[name].parts(), strict=True))


@pytest.mark.parametrize("has_room", [True, False])
def test_a_head_that_copies_the_embedding_gets_the_row_of_the_mask_token_too(has_room):
    model, expected = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    rows = len(model.lm_head.weight)
    in_use = rows - has_room
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(in_use)}, unk_token="w0"))
    assert store_tied_head(model, "int8")
    for one in (model, expected):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
        assert add_mask_token(one, tokenizer, None, trained=False) == in_use
    embedding = expected.model.embed_tokens.weight
    assert expected.lm_head.weight is embedding and len(embedding) == in_use + 1
    assert model.model.embed_tokens.weight.equal(embedding) and model.lm_head.copies_embedding
    parts = zip(model.lm_head.parts(), dk.quantize_weight(embedding), strict=True)
    assert all(part.equal(own) for part, own in parts)


def test_the_command_and_other_values(tmp_path):
    folder, _ = write(tmp_path / "source", "llama")
    arguments = ["convert", str(folder), str(tmp_path / "out"), "--weights", "int8"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert stored_layers(dk.load(tmp_path / "out", device="cpu")[0])
    with pytest.raises(ValueError, match="weights is 'int4'; allowed: 'bfloat16', 'int8', None"):
        convert(folder, tmp_path / "other", weights="int4")
    assert not (tmp_path / "other").exists()
