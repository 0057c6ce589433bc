"""Files of checkpoints: shards, dtypes, memory, damage, and how saving replaces what was there."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import dllm_kernels as dk
from dllm_kernels.models import checkpoint
from tests.models.published_checkpoints import EOS, MASK, PUBLISHED

LLADA = PUBLISHED["llada"]


def same(model, other) -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def model(tmp_path):
    return dk.load(LLADA.write(tmp_path / "published"), device="cpu")[0]


@pytest.mark.parametrize("layout", [None, "llada"])
def test_shards(model, tmp_path, layout):
    dk.save(model, None, tmp_path / "shards", layout=layout, max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert same(dk.load(tmp_path / "shards", device="cpu")[0], model)


def test_bfloat16_weights_keep_their_bits(tmp_path):
    folder = LLADA.write(tmp_path / "published", dtype=torch.bfloat16)
    model, _ = dk.load(folder, device="cpu", dtype=torch.bfloat16)
    dk.save(model, None, tmp_path / "again", layout="llada")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    wide, _ = dk.load(folder, device="cpu")
    assert wide.dtype == torch.float32 and same(wide, model.float())


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_own_code_of_llada_takes_what_is_written(tmp_path, use_cache):
    model, _ = dk.load(LLADA.write(tmp_path / "published", use_cache=use_cache), device="cpu")
    dk.save(model, None, tmp_path / "again", layout="llada")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["use_cache"] is False


def test_tied_weights_are_one_tensor_again(tmp_path):
    weights = LLADA.tensors()
    head = weights.pop("model.transformer.ff_out.weight")
    folder = LLADA.write(tmp_path / "tied", weight_tying=True)
    save_file(weights, folder / "model.safetensors")
    model, _ = dk.load(folder, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    dk.save(model, None, tmp_path / "own", layout="llada")
    assert load_file(tmp_path / "own" / "model.safetensors").keys() == weights.keys()

    save_file({**weights, "model.transformer.ff_out.weight": head}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed_tokens.weight differs from lm_head.weight, to which"):
        dk.load(folder, device="cpu")


MEMORY = """
    import re, resource, sys, threading
    import torch
    import dllm_kernels as dk

    def private():
        return int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

    small, large, size, merge = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "merged"
    dk.load(small, device="cpu", merge_projections=merge)  # what every load needs once: imports, caches
    limit = private() + int(1.5 * size)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    model, _ = dk.load(large, device="cpu", merge_projections=merge)
    try:
        second = torch.empty(size, dtype=torch.uint8)
    except RuntimeError:
        print("once")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory on Linux")
@pytest.mark.parametrize("projections", ["stock", "merged"])
def test_loading_holds_the_weights_once(model, tmp_path, projections):
    """In a process that may not have one and a half times their size."""
    config = dict(model.config.to_dict(), hidden_size=256, intermediate_size=4096, num_hidden_layers=8)
    config |= dict(head_dim=64)
    large = type(model)(type(model.config).from_dict(config))
    size = sum(weight.nbytes for weight in large.parameters())
    assert size > 80e6
    dk.save(large, None, tmp_path / "large", layout="llada", max_shard_size="30MB")
    arguments = [tmp_path / "published", tmp_path / "large", size, projections]
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout == "once\n", done.stderr[-2000:]


def test_damaged_files_are_named(model, tmp_path):
    dk.save(model, None, tmp_path / "shards", max_shard_size="30KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{shards[1].name} is not a complete safetensors file"):
        dk.load(tmp_path / "shards", device="cpu")
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ValueError, match=rf"{shards[1].name} lacks .* model.safetensors.index.json says"):
        dk.load(tmp_path / "shards", device="cpu")
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"names '{shards[1].name}', which is not in the folder"):
        dk.load(tmp_path / "shards", device="cpu")


def test_an_index_cannot_point_out_of_the_folder(tmp_path):
    folder = LLADA.write(tmp_path / "a")
    index = {"weight_map": dict.fromkeys(LLADA.weights, "../b/model.safetensors")}
    LLADA.write(tmp_path / "b")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"'../b/model.safetensors', which is not in the folder"):
        dk.load(folder, device="cpu")


def test_what_is_not_read(tmp_path):
    folder = LLADA.write(tmp_path / "a", quantization_config={"bits": 4})
    with pytest.raises(ValueError, match="quant_method is None; quantized weights are read where"):
        dk.load(folder, device="cpu")
    LLADA.write(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="other formats are not read"):
        dk.load(folder, device="cpu")
    for text, reason in (
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json holds a list"),
        (json.dumps({**LLADA.config, "n_layers": "two"}), "config.json: .*num_hidden_layers"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            dk.load(folder, device="cpu")


# ---- saving --------------------------------------------------------------------------------------------
def test_saving_replaces_a_checkpoint_and_leaves_other_files(model, tmp_path):
    target = tmp_path / "deep" / "target"
    dk.save(model, None, target, max_shard_size="30KB")
    (target / "README.md").write_text("mine")
    dk.save(model, None, target)
    assert sorted(file.name for file in target.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert same(dk.load(target, device="cpu")[0], model)
    assert [folder.name for folder in target.parent.iterdir()] == ["target"]
    assert (target / "model.safetensors").stat().st_mode == (target / "README.md").stat().st_mode


@pytest.fixture
def replaced(model, tmp_path):
    """Files that a save moved out of a folder before it died."""
    dk.save(model, None, tmp_path / "a")
    replaced = tmp_path / "a" / ".dllm-save-0123" / "replaced"
    replaced.mkdir(parents=True)
    (tmp_path / "a" / "config.json").rename(replaced / "config.json")
    return replaced


def test_loading_undoes_a_save_that_died_while_it_replaced_files(model, tmp_path, replaced):
    assert same(dk.load(tmp_path / "a", device="cpu")[0], model)
    assert not list((tmp_path / "a").glob(".*"))


def test_a_save_that_died_is_named_where_the_folder_cannot_be_written(model, tmp_path, replaced, monkeypatch):
    def denied(*arguments):
        raise PermissionError

    monkeypatch.setattr(Path, "rename", denied)
    said = rf"a dk.save to it was interrupted while .*{replaced}; make the folder writ"
    with pytest.raises(ValueError, match=said):
        dk.load(tmp_path / "a", device="cpu")
    monkeypatch.undo()
    dk.save(model, None, tmp_path / "a")
    assert same(dk.load(tmp_path / "a", device="cpu")[0], model)
    assert not list((tmp_path / "a").glob(".*"))


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(model, tmp_path, monkeypatch):
    dk.save(model, None, tmp_path / "a")
    read = checkpoint.stored_tensors

    def replace_then_read(folder):
        dk.save(model, None, folder)
        return read(folder)

    monkeypatch.setattr(checkpoint, "stored_tensors", replace_then_read)
    with pytest.raises(ValueError, match="a was replaced while it was read"):
        dk.load(tmp_path / "a", device="cpu")


@pytest.mark.parametrize("size", ["5", "foo", "-5GB", 0, -1, 1.5, None, True])
def test_shard_sizes_that_are_none(model, tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size is"):
        dk.save(model, None, tmp_path / "a", max_shard_size=size)
    assert not (tmp_path / "a").exists()


def test_an_empty_path_is_not_the_current_folder(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="folder is empty"):
        dk.save(model, None, "")
    assert not any((tmp_path / "here").iterdir())


def test_a_full_disk_is_named(model, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match=rf"{tmp_path / 'a'}: No space left"):
        dk.save(model, None, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_tokenizer_with_another_mask_token_is_not_saved(model, tmp_path):
    _, tokenizer = dk.load("tiny-python", device="cpu")
    with pytest.raises(ValueError, match=r"mask_token_id is \d+ in config.json and 4094 in the tokenizer"):
        dk.save(model, tokenizer, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.masked_bias"])
def test_buffers_of_former_transformers_are_passed_over(model, tmp_path, name):
    dk.save(model, None, tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    save_file({**weights, name: torch.ones(8)}, tmp_path / "a" / "model.safetensors")
    assert same(dk.load(tmp_path / "a", device="cpu")[0], model)


def test_a_new_tokenizer_leaves_no_file_of_the_old_one(tmp_path):
    model, tokenizer = dk.load("tiny-python", device="cpu")
    tokenizer.chat_template = "{{ messages }}"
    dk.save(model, tokenizer, tmp_path / "a")
    assert (tmp_path / "a" / "chat_template.jinja").is_file()
    tokenizer.chat_template = None
    dk.save(model, tokenizer, tmp_path / "a")
    assert not (tmp_path / "a" / "chat_template.jinja").exists()
    dk.save(model, None, tmp_path / "a")
    assert (tmp_path / "a" / "tokenizer.json").is_file()


@pytest.mark.parametrize("before", ["nothing", "a checkpoint"])
def test_saving_that_fails_changes_nothing(model, tmp_path, before):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise KeyboardInterrupt

    target = tmp_path / "out" / "target"
    if before == "a checkpoint":
        dk.save(model, None, target)
    files = contents(tmp_path / "out")
    model.model.norm.weight.data.zero_()
    with pytest.raises(KeyboardInterrupt):
        dk.save(model, Tokenizer(), target)
    assert contents(tmp_path / "out") == files
    assert len(list(tmp_path.joinpath("out").iterdir())) == (before == "a checkpoint")


def test_a_folder_that_is_a_file(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="which is a file"):
        dk.save(model, None, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_into_the_current_folder(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    dk.save(model, None, ".")
    assert same(dk.load(Path("."), device="cpu")[0], model)


def test_end_tokens_of_both_configs(tmp_path):
    folder = LLADA.write(tmp_path / "a")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, EOS], "temperature": 0.0}))
    model, _ = dk.load(folder, device="cpu")
    assert model.config.eos_token_id == [EOS, 7] == model.generation_config.eos_token_id
    dk.save(model, None, tmp_path / "own", layout="llada")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["eos_token_id"] == EOS
    written = json.loads((tmp_path / "own" / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["mask_token_id"]) == ([EOS, 7], MASK)
    for layout in (None, "llada"):
        dk.save(model, None, tmp_path / "b", layout=layout)
        assert dk.load(tmp_path / "b", device="cpu")[0].config.eos_token_id == [EOS, 7]
