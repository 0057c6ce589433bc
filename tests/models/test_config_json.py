"""Whatever the files of a checkpoint say: the model, or a ValueError that names the file."""

import copy
import json
import random
import struct
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dllm_kernels as dk
from tests.models.published_checkpoints import PUBLISHED
from tests.sampling.tiny_models import tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def folder(tmp_path):
    dk.save(tiny_model("qwen3"), None, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def entries_of(folder, file="config.json") -> dict:
    return json.loads((folder / file).read_text())


def change(folder, file="config.json", **entries) -> None:
    (folder / file).write_text(json.dumps({**entries_of(folder, file), **entries}))


WRONG = [
    dict(mask_token_id=1.5), dict(mask_token_id=-3), dict(mask_token_id=[]), dict(mask_token_id=[5]),
    dict(mask_token_id=120), dict(mask_token_id=True), dict(mask_token_id="5"), dict(pad_token_id=2**31),
    dict(pad_token_id=-1), dict(pad_token_id=[0]), dict(eos_token_id=-1), dict(eos_token_id=[1, 2.0]),
    dict(eos_token_id=[1, 120]), dict(eos_token_id="x"), dict(eos_token_id={"a": 1}), dict(bos_token_id=500),
    dict(num_attention_heads=0), dict(num_attention_heads=3), dict(num_attention_heads="4"),
    dict(num_key_value_heads=3), dict(num_key_value_heads=0), dict(head_dim=-1), dict(head_dim=7),
    dict(hidden_size=0), dict(hidden_size=33), dict(hidden_size=32.5), dict(intermediate_size=2**40),
    dict(intermediate_size=-48), dict(vocab_size=2**62), dict(vocab_size=0), dict(vocab_size=119),
    dict(num_hidden_layers=10**9), dict(num_hidden_layers=0), dict(num_hidden_layers=3),
    dict(num_hidden_layers=1e12), dict(max_position_embeddings=0), dict(max_position_embeddings="x"),
    dict(rope_theta="x"), dict(rope_theta=-1.0), dict(rope_theta=True), dict(rope_parameters=5),
    dict(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
    dict(rope_parameters={"rope_type": "default", "rope_theta": 0}),
    dict(rope_parameters={"rope_type": "nonsense", "rope_theta": 1e4}),
    dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}),
    dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}),
    dict(hidden_act="nonsense"), dict(hidden_act=5), dict(rms_norm_eps="x"),
    dict(rms_norm_eps=float("nan")), dict(max_position_embeddings=2**70), dict(hidden_size=2**70),
    dict(tie_word_embeddings="x"), dict(layer_types=["nonsense"] * 2), dict(layer_types=5),
    dict(attention_bias="x"),
    dict(diffusion=5), dict(diffusion={"attention": 5}), dict(diffusion={"attention": "bidirectional"}),
    dict(diffusion={"attention": ["bidirectional"], "block_size": 0}),
    dict(diffusion={"attention": ["bidirectional"], "shift": 1}),
    dict(diffusion={"attention": ["bidirectional"], "chat": 1}),
    dict(model_type=[]), dict(model_type=None), dict(model_type="nonsense"), dict(to_dict=5),
    dict(get_text_config=5),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_an_entry_that_no_model_can_have(folder, wrong):
    change(folder, **wrong)
    with pytest.raises(ValueError, match=str(folder)):
        dk.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (dict(mask_token_id=120), "config.json: mask_token_id is 120; it must be an integer from 0 to 119"),
        (dict(eos_token_id=[1, 500]), r"eos_token_id is \[1, 500\]; .* from 0 to 119, or a list of them"),
        (dict(num_key_value_heads=3), "num_attention_heads is 4, not a multiple of num_key_value_heads, 3"),
        (
            dict(num_hidden_layers=10**9),
            "num_hidden_layers is 1000000000; no model has more than 10000 layers",
        ),
        (
            dict(intermediate_size=2**40),
            r"of \[1099511627776, 32\] is more than the model can have, and the w",
        ),
        (dict(attention_chunk_size="x"), "attention_chunk_size is 'x'; it must be an integer >= 1, or null"),
        (dict(attention_chunk_size=[1]), r"attention_chunk_size is \[1\]; it must be an integer"),
        (dict(attention_chunk_size=-1), "attention_chunk_size is -1; it must be an integer"),
        (dict(use_sliding_window=True, sliding_window=-3), "sliding_window is -3; it must be an integer"),
        (dict(rope_theta="x"), "config.json: rope_theta is 'x'; it must be a number"),
        (dict(num_attention_heads=8, head_dim=16), "mismatched: .*q_proj.weight is"),
    ],
    ids=str,
)
def test_the_entry_is_named(folder, wrong, reason):
    change(folder, **wrong)
    with pytest.raises(ValueError, match=reason):
        dk.load(folder, device="cpu")


VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    0.5,
    -1e300,
    float("inf"),
    "",
    "x",
    [],
    [1],
    [None],
    {},
    {"a": 1},
)


def test_mutated_entries_are_refused_or_change_nothing(folder):
    """One entry at a time becomes something else, is removed, or is added."""
    good, random_ = entries_of(folder), random.Random(0)
    expected = dk.load(folder, device="cpu")[0](IDS).logits
    paths = [(key,) for key in good] + [
        (key, inner) for key, value in good.items() if isinstance(value, dict) for inner in value
    ]
    settings = {  # that change the numbers, as they should
        "rms_norm_eps", "rope_theta", "rope_parameters", "num_attention_heads", "hidden_act",
        "sliding_window", "use_sliding_window", "layer_types", "max_window_layers", "diffusion",
    }  # fmt: skip
    for path in paths:
        for value in random_.sample(VALUES, 5):
            entries = copy.deepcopy(good)
            inner = entries if len(path) == 1 else entries[path[0]]
            inner[path[-1]] = value
            (folder / "config.json").write_text(json.dumps(entries))
            try:
                model, _ = dk.load(folder, device="cpu")
            except ValueError as error:
                assert str(folder) in str(error), (path, value)
            else:
                assert settings & set(path) or torch.equal(model(IDS).logits, expected), (path, value)


def test_code_of_the_checkpoint_is_not_named(folder):
    """Names of attention and expert code may be those of repositories, which would be fetched and run."""
    change(folder, attn_implementation="somebody/kernels", _attn_implementation="somebody/kernels",
           experts_implementation="somebody/kernels", auto_map={"AutoConfig": "code.Config"})  # fmt: skip
    model, _ = dk.load(folder, device="cpu")
    assert model.config._attn_implementation in ("sdpa", "dllm")


def test_the_end_tokens_of_an_architecture_may_be_of_another_vocabulary(tmp_path):
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    assert config.eos_token_id == 50256
    config.diffusion, config.mask_token_id = {"attention": ["bidirectional"]}, 49
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    dk.load(tmp_path, device="cpu")


# ---- other files -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ends", [-1, 120, "x", [0, None], {"a": 1}, 1.0])
def test_end_tokens_of_generation_config(folder, ends):
    change(folder, "generation_config.json", eos_token_id=ends)
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id is .*; it must be an integer"
    ):
        dk.load(folder, device="cpu")


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "\ufeff{}", "[" * 10**5, '{"a": 1' + "0" * 5000 + "}"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_json_that_is_none(folder, file, text):
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=file):
        dk.load(folder, device="cpu")
    (folder / file).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=file):
        dk.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("index", "error", "reason"),
    [
        ({}, ValueError, "weight_map None; it must name the file of every weight"),
        ({"weight_map": []}, ValueError, r"weight_map \[\]; it must name"),
        ({"weight_map": {"a": 5}}, ValueError, "has 5 as the file of a; it must be a file name"),
        (
            {"weight_map": {"a": "/etc/passwd"}},
            FileNotFoundError,
            "names '/etc/passwd', which is not in the f",
        ),
        ({"weight_map": {"a": ".."}}, FileNotFoundError, "names '..', which is not in the folder"),
        ({"weight_map": {"a": ""}}, FileNotFoundError, "names '', which is not in the folder"),
        (
            {"weight_map": {"a": "model.safetensors"}},
            ValueError,
            "lacks a, which model.safetensors.index.json",
        ),
    ],
)
def test_an_index_that_is_wrong(folder, index, error, reason):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=reason):
        dk.load(folder, device="cpu")


def test_a_weight_in_two_files(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "second.safetensors")
    places = {name: "model.safetensors" for name in weights}
    places["model.norm.weight"] = "second.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"second.safetensors holds .*, and so does model.safetensors"):
        dk.load(folder, device="cpu")


@pytest.mark.parametrize("data", [b"", b"\x00" * 4, b"\xff" * 8, struct.pack("<Q", 2) + b"{}x", b"PK" * 400])
def test_weights_that_are_no_safetensors_file(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors is not a complete safetensors file|missing"):
        dk.load(folder, device="cpu")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.int64,
        torch.bool,
        torch.uint8,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_weights_of_other_dtypes_are_not_cast(folder, dtype):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"mismatched: model.norm.weight is "):
        dk.load(folder, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_floating_point_dtype_are(folder, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    model, _ = dk.load(folder, device="cpu")
    assert all(torch.equal(tensor, weights[name].float()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("gone", [0, 3], ids=["the first", "the last"])
def test_an_expert_that_is_missing(tmp_path, gone):
    sizes = dict(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    config = transformers.Qwen3MoeConfig(
        **sizes, intermediate_size=24, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
        diffusion={"attention": ["bidirectional"]}, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    moved = {name.replace(f"experts.{gone}.", "experts.7."): tensor for name, tensor in weights.items()}
    save_file(moved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts.\*.*: there are 4, from . to 7, and not 0 to 3"):
        dk.load(tmp_path, device="cpu")
    fewer = {name: tensor for name, tensor in weights.items() if f"experts.{gone}." not in name}
    save_file(fewer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="experts"):
        dk.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "text", ["{", "[]", "5", '{"model": {"type": "BPE", "vocab": 5}}', '{"version": "1.0"}', "[" * 10**5]
)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files_that_are_wrong(tmp_path, file, text):
    model, tokenizer = dk.load("tiny-python", device="cpu")
    dk.save(model, tokenizer, tmp_path)
    if file == "tokenizer_config.json" and text.startswith("{") and len(text) > 1:
        text = json.dumps({**entries_of(tmp_path, file), "tokenizer_class": 5})
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=rf"the tokenizer of .* cannot be read.*{file}"):
        dk.load(tmp_path, device="cpu")


def test_a_chat_template_that_is_no_text(tmp_path):
    dk.save(*dk.load("tiny-python", device="cpu"), tmp_path)
    change(tmp_path, "tokenizer_config.json", chat_template=5)
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be read.*(chat_template|int)"):
        dk.load(tmp_path, device="cpu")


def test_entries_that_are_nested_too_deep(folder):
    depth = 7 * sys.getrecursionlimit() // 10  # torch.compile raises the limit in a process
    deep = "{" + '"a": {' * depth + "}" * (depth + 1)
    (folder / "config.json").write_text(json.dumps(entries_of(folder))[:-1] + f', "extra": {deep}}}')
    with pytest.raises(ValueError, match=rf"{folder}.*nested too deeply"):
        dk.load(folder, device="cpu")


def test_llada_entries_of_other_types(tmp_path):
    for wrong in (
        dict(d_model="x"), dict(n_heads=0), dict(mlp_hidden_size=[]), dict(n_kv_heads=3), dict(n_layers=-1),
        dict(n_layers=10**9), dict(rope_theta="x"), dict(activation_type=5), dict(diffusion=5),
    ):  # fmt: skip
        folder = PUBLISHED["llada"].write(tmp_path, **wrong)
        with pytest.raises(ValueError, match=str(folder)):
            dk.load(folder, device="cpu")
