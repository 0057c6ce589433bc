"""dk.load: names, families, kinds of attention, and weights that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dllm_kernels as dk

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "models" / "a2d_qwen3_tiny"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of an A2D checkpoint that a test may change."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN, folder)
    return folder


def change(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def test_an_a2d_checkpoint_becomes_a_stock_model():
    model, tokenizer = dk.load(GOLDEN, device="cpu")
    assert type(model).__name__ == "Qwen3ForCausalLM" and tokenizer is None
    assert model.dtype == torch.float32 and not model.training
    assert model.config.diffusion["attention"] == ["bidirectional", "block_causal"]


def test_the_kind_of_attention_is_picked_at_load():
    prompts, options = [[5, 6, 7]], dict(max_new_tokens=8, block_size=4, mask_id=299)
    bidirectional, _ = dk.load(GOLDEN, device="cpu")
    with pytest.raises(ValueError, match="this model is bidirectional"):
        dk.sample(bidirectional, prompts, cache="block", **options)
    block_causal, _ = dk.load(GOLDEN, device="cpu", attention="block_causal")
    assert dk.sample(block_causal, prompts, cache="block", **options).lengths.tolist() == [8]
    with pytest.raises(ValueError, match="trained for bidirectional, block_causal"):
        dk.load(GOLDEN, attention="causal")


def test_what_is_saved_loads_again(tmp_path):
    model, _ = dk.load(GOLDEN, device="cpu", attention="block_causal")
    model.save_pretrained(tmp_path)
    again, _ = dk.load(tmp_path, device="cpu")
    assert again.config.diffusion["attention"][0] == "block_causal"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_dtype():
    assert dk.load(GOLDEN, device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_config_of_a_checkpoint_names_its_mask(checkpoint):
    change(checkpoint, mask_token_id=299, diffusion={"attention": ["block_causal"], "block_size": 4})
    model, _ = dk.load(checkpoint, device="cpu")
    output = dk.sample(model, [[1, 2]], max_new_tokens=6, steps_per_block=1)
    assert output.forwards == 2 and not (output.sequences == 299).any()


@pytest.mark.parametrize("wrong", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit(checkpoint, wrong):
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = weights.pop(name)
    if wrong == "unexpected":
        weights |= {name: tensor, "model.layers.9.mlp.up_proj.weight": tensor.clone()}
    if wrong == "shape":
        weights[name] = tensor[:3].clone()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="up_proj"):
        dk.load(checkpoint, device="cpu")


def test_models_that_are_no_diffusion_models(checkpoint):
    change(checkpoint, model_type="t5")
    with pytest.raises(ValueError, match="'t5' is not a known family; known: llada, Dream"):
        dk.load(checkpoint)
    change(checkpoint, model_type="qwen3")
    with pytest.raises(ValueError, match='no "diffusion" entry'):
        dk.load(checkpoint)
    change(checkpoint, model_type="qwen3", diffusion={"attention": ["sideways"]})
    with pytest.raises(ValueError, match="attention 'sideways'"):
        dk.load(checkpoint)


@pytest.mark.parametrize("name", ["tiny-pascal", "a/b/c", ""])
def test_names_that_mean_nothing(name):
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r'known names: tiny-python.*hub name "owner/name"'
    ):
        dk.load(name)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        dk.load(tmp_path)
    with pytest.raises(TypeError, match="name is a int"):
        dk.load(3)


def test_a_hub_name_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="'owner/name' is not a folder here, and the hub did not return it"):
        dk.load("owner/name")


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        (dict(device="gpu"), ValueError, "device is 'gpu': "),
        (dict(device="meta"), ValueError, "device is meta, which cannot hold weights"),
        (dict(device="cuda:99"), ValueError, "device is 'cuda:99': "),
        (dict(device=99), ValueError, "device is 99: "),
        (dict(device=True), ValueError, "device is "),
        (dict(dtype=torch.float8_e4m3fn), TypeError, "dtype is torch.float8_e4m3fn; give a floating point"),
        (dict(dtype=torch.complex64), TypeError, "dtype is torch.complex64; give a floating point"),
        (dict(dtype=torch.int8), TypeError, "dtype is torch.int8; give a floating point"),
        (dict(dtype="single"), TypeError, "dtype is 'single'; give a floating point"),
    ],
)
def test_places_and_dtypes_that_cannot_be(options, error, reason):
    with pytest.raises(error, match=reason):
        dk.load(GOLDEN, **options)


def test_a_tokenizer_that_cannot_be_read(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{")
    (checkpoint / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer of .*checkpoint cannot be read"):
        dk.load(checkpoint)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(model=torch.nn.Linear(2, 2)), "model is a Linear; dk.save writes transformers models"),
        (dict(tokenizer=5), "tokenizer is a int"),
        (dict(folder=None), "folder is a NoneType"),
    ],
    ids=["model", "tokenizer", "folder"],
)
def test_what_cannot_be_saved(change, reason, tmp_path):
    model, _ = dk.load(GOLDEN, device="cpu")
    with pytest.raises(TypeError, match=reason):
        dk.save(**{"model": model, "tokenizer": None, "folder": tmp_path / "new", **change})
    assert not any(tmp_path.iterdir())
