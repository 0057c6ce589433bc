"""Checkpoints whose linear layers are int8 or bfloat16: written and read without a float32 weight."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dllm_kernels as dk
from dllm_kernels.models import checkpoint_files
from dllm_kernels.models.checkpoint import read_checkpoint
from dllm_kernels.models.saved_weights import saved_state
from dllm_kernels.models.stored_weights import KINDS_ON, StoredLinear, store_weights
from dllm_kernels.ops.skinny_linear import dequantize_weight
from tests.models.published_checkpoints import PUBLISHED
from tests.models.tiny_types import logits
from tests.models.tiny_types import tiny_model as tiny_type
from tests.sampling.tiny_models import prompts_of, tiny_model

UP = "model.layers.0.mlp.up_proj"


def rounded(kind: str = "int8"):
    model = copy.deepcopy(tiny_model())
    store_weights(model, kind)
    return model


def saved(folder, kind: str = "int8", model=None):
    """Write a model with stored weights; return it as it is read back."""
    dk.save(rounded(kind) if model is None else model, None, folder)
    return dk.load(folder, device="cpu")[0]


def in_groups(model, size: int, *names: str):
    """Store layers of `model` with a scale for each `size` inputs."""
    for name in names:
        linear = model.get_submodule(name)
        parts = linear.weight.detach().unflatten(1, (-1, size))
        scales = parts.abs().amax(2) / 127
        weight = (parts / scales[..., None]).round().to(torch.int8).flatten(1)
        model.set_submodule(name, StoredLinear.of(weight, scales, linear.bias))
    return model


def same(one, other) -> bool:
    ours, theirs = saved_state(one), saved_state(other)
    kept = all(ours[name].equal(theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    return ours.keys() == theirs.keys() and kept


def changed(folder, change=lambda config: None, tensors=lambda tensors: None):
    """Rewrite parts of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    tensors(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


# ---- round trips -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PUBLISHED)
def test_int8_models_of_every_layout_come_back_bit_for_bit(name, tmp_path):
    model, _ = dk.load(PUBLISHED[name].write(tmp_path / "source"), device="cpu", weights="int8")
    again = saved(tmp_path / "stock", model=model)
    assert any(isinstance(module, StoredLinear) for module in again.modules()) and same(again, model)
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert again(input_ids=ids).logits.equal(model(input_ids=ids).logits)


@pytest.mark.parametrize("layout", ["llada", "Dream", "sdar"])
def test_int8_models_are_written_in_the_layout_of_a_family(layout, tmp_path):
    model, _ = dk.load(PUBLISHED[layout].write(tmp_path / "source"), device="cpu", weights="int8")
    dk.save(model, None, tmp_path / "own", layout=layout)
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    floats = load_file(tmp_path / "source" / "model.safetensors")
    assert {name for name in tensors if not name.endswith("_scale")} == floats.keys()
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["model_type"] == layout
    head = "model.transformer.ff_out" if layout == "llada" else "lm_head"
    assert config["quantization_config"]["ignore"] == []
    assert tensors[f"{head}.weight"].dtype == torch.int8
    assert same(dk.load(tmp_path / "own", device="cpu")[0], model)


@pytest.mark.parametrize(("name", "masked"), [("mixtral", False), ("phi3", False), ("bert", True)])
def test_int8_models_of_other_types_come_back_in_shards(name, masked, tmp_path):
    model = tiny_type(name, masked)
    store_weights(model, "int8")
    dk.save(model, None, tmp_path, max_shard_size="40KB")
    again, _ = dk.load(tmp_path, device="cpu")
    assert same(again, model)
    torch.testing.assert_close(logits(again), logits(model), atol=0.02, rtol=0)


def test_bfloat16_is_an_ordinary_checkpoint_with_bfloat16_weights(tmp_path):
    model = rounded("bfloat16")
    stock = saved(tmp_path, model=model)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert dtypes[f"{UP}.weight"] == torch.bfloat16 and dtypes["lm_head.weight"] == torch.float32
    assert type(stock.get_submodule(UP)) is nn.Linear
    again, _ = dk.load(tmp_path, device="cpu", weights="bfloat16")
    assert same(again, model)
    prompts = prompts_of(5)
    expected = dk.sample(model, prompts, max_new_tokens=8).sequences
    assert dk.sample(again, prompts, max_new_tokens=8).sequences.equal(expected)
    assert dk.sample(stock, prompts, max_new_tokens=8).sequences.equal(expected)


def test_an_int8_checkpoint_samples_as_the_model_that_was_saved(tmp_path):
    model = rounded()
    again, prompts, options = saved(tmp_path, model=model), prompts_of(5, 12), dict(max_new_tokens=16)
    expected = dk.sample(model, prompts, **options)
    assert dk.sample(again, prompts, **options).sequences.equal(expected.sequences)


def test_layers_with_groups_of_inputs_keep_them(tmp_path):
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in range(2) for part in ("gate", "up")]
    model = in_groups(copy.deepcopy(tiny_model()), 16, *names)
    again = saved(tmp_path / "one", model=model)
    assert same(again, model) and again.get_submodule(UP).parts()[1].shape == (48, 2)
    group = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert group["group_0"]["targets"] == ["Linear"]
    assert (group["group_0"]["weights"]["strategy"], group["group_0"]["weights"]["group_size"]) == (
        "group",
        16,
    )
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    store_weights(model, "int8")  # the others, with one scale per output
    again = saved(tmp_path / "two", model=model)
    assert same(again, model) and again.model.layers[0].mlp.down_proj.parts()[1].shape == (32, 1)


def test_the_checkpoint_is_that_of_compressed_tensors(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight, "dynamic": False, "strategy": "channel", "group_size": None},
                "input_activations": {**eight, "dynamic": True, "strategy": "token"},
            }
        },
        "ignore": [],
        "kv_cache_scheme": None,
    }
    assert config["diffusion"]["attention"] == ["block_causal"]
    tensors = load_file(tmp_path / "model.safetensors")
    expected = dk.quantize_weight(tiny_model().get_submodule(UP).weight)
    assert tensors[f"{UP}.weight"].equal(expected[0]) and tensors[f"{UP}.weight_scale"].equal(expected[1])


def test_compressed_tensors_reads_it(tmp_path):
    pytest.importorskip("compressed_tensors")
    import transformers

    model = rounded()
    dk.save(model, None, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        theirs(input_ids=torch.arange(2, 10)[None])  # decompresses
    assert theirs.get_submodule(UP).weight.float().equal(dequantize_weight(*model.get_submodule(UP).parts()))


# ---- weights= ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", KINDS_ON["cpu"])
def test_weights_are_rounded_while_they_are_read(kind, size, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_READ_AT_ONCE", 1)  # every tensor from a file opened anew
    dk.save(tiny_model(), None, tmp_path, max_shard_size=size)
    model, _ = dk.load(tmp_path, device="cpu", weights=kind)
    assert same(model, rounded(kind)) and not model.training
    half, _ = dk.load(tmp_path, device="cpu", weights=kind, dtype=torch.bfloat16)
    expected = copy.deepcopy(tiny_model()).to(torch.bfloat16)
    store_weights(expected, kind)
    assert same(half, expected)


def test_int8_checkpoints_become_what_weights_asks_for(tmp_path):
    model = rounded()
    saved(tmp_path)
    whole = dequantize_weight(*model.get_submodule(UP).parts())
    read = {
        kind: dk.load(tmp_path, device="cpu", weights=kind)[0].get_submodule(UP)
        for kind in ("float32", "bfloat16", "int8")
    }
    assert read["float32"].parts()[0].equal(whole) and read["bfloat16"].parts()[0].equal(whole.bfloat16())
    assert read["int8"].parts()[0].equal(model.get_submodule(UP).parts()[0])
    dk.save(dk.load(tmp_path, device="cpu", weights="float32")[0], None, tmp_path / "float")
    trainable, _ = dk.load(tmp_path / "float", device="cpu")
    assert type(trainable.get_submodule(UP)) is nn.Linear and trainable.get_submodule(UP).weight.equal(whole)
    stock, _ = read_checkpoint(tmp_path, torch.device("cpu"), torch.float32, weights="stock")
    assert type(stock.get_submodule(UP)) is nn.Linear and stock.get_submodule(UP).weight.equal(whole)


def test_float_layers_of_an_int8_checkpoint_follow_weights(tmp_path):
    model = in_groups(copy.deepcopy(tiny_model()), 16, UP)
    saved(tmp_path, model=model)
    store_weights(model, "int8")
    again, _ = dk.load(tmp_path, device="cpu", weights="int8")
    assert same(again, model)


def test_no_float_copy_of_a_stored_weight_is_made(tmp_path):
    saved(tmp_path)
    made = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and not out.is_meta:
                made.append((function, out.shape))
            return out

    with Recorder():
        dk.load(tmp_path, device="cpu")
    shapes = {module.weight.shape for module in tiny_model().modules() if type(module) is nn.Linear}
    shapes -= {tiny_model().lm_head.weight.shape}
    found = {str(function) for function, shape in made if shape in shapes}
    assert found <= {"aten.empty.memory_format", "aten.detach.default"}  # that nn.Linear's constructor drops


def test_adapters_are_merged_into_dequantized_weights(tmp_path):
    peft = pytest.importorskip("peft")
    saved(tmp_path / "base")
    stock, _ = read_checkpoint(tmp_path / "base", torch.device("cpu"), torch.float32, weights="stock")
    options = dict(r=2, target_modules=["up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(stock, peft.LoraConfig(**options))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().get_submodule(UP).weight
    model, _ = dk.load(tmp_path / "adapter", device="cpu", base=tmp_path / "base")
    torch.testing.assert_close(model.get_submodule(UP).weight, expected)
    small, _ = dk.load(tmp_path / "adapter", device="cpu", base=tmp_path / "base", weights="int8")
    assert isinstance(small.get_submodule(UP), StoredLinear)


# ---- others' checkpoints -----------------------------------------------------------------------------------
def test_checkpoints_of_other_tools_are_read(tmp_path):
    """As llm-compressor writes them: patterns, bfloat16 scales, entries that say nothing new."""

    def describe(config):
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["targets"] = [r"re:.*_proj$"]
        group["weights"] |= {"observer": "minmax", "observer_kwargs": {}, "actorder": None}
        group["format"] = "int-quantized"
        config["quantization_config"] |= {
            "ignore": ["lm_head", r"re:.*layers\.1\.mlp\..*"],
            "global_compression_ratio": 1.5,
            "sparsity_config": {},
            "transform_config": {},
        }

    def narrow(tensors):
        for name, tensor in list(tensors.items()):
            if name.startswith(("model.layers.1.mlp", "lm_head")):
                del tensors[name]
                if not name.endswith("_scale"):
                    tensors[name] = tiny_model().state_dict()[name]
            elif name.endswith("_scale"):
                tensors[name] = tensor.bfloat16()

    saved(tmp_path)
    model, _ = dk.load(changed(tmp_path, describe, narrow), device="cpu")
    weight, scales = rounded().get_submodule(UP).parts()
    assert model.get_submodule(UP).parts()[0].equal(weight)
    assert model.get_submodule(UP).parts()[1].equal(scales.bfloat16().float())
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear


def test_the_vocabulary_projection_is_int8_too(tmp_path):
    saved(tmp_path)
    model, _ = dk.load(tmp_path, device="cpu")
    assert isinstance(model.lm_head, StoredLinear)
    weight, scales = model.lm_head.parts()
    stock, _ = dk.load(tmp_path, device="cpu", weights="float32")
    assert type(stock.lm_head) is nn.Linear and stock.lm_head.weight.equal(weight * scales)


# ---- bad input ---------------------------------------------------------------------------------------------
def of_group(**changes):
    return lambda config: config["quantization_config"]["config_groups"]["group_0"].update(changes)


def of_weights(**changes):
    return lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)


def of_config(**changes):
    return lambda config: config["quantization_config"].update(changes)


UNREAD = {
    "quant_method is 'gptq'; quantized weights are read where it is 'compressed-tensors'": of_config(
        quant_method="gptq"
    ),
    "format is 'pack-quantized'": of_config(format="pack-quantized"),
    "quantization_status is 'frozen'": of_config(quantization_status="frozen"),
    r"kv_cache_scheme is \{'num_bits': 8\}": of_config(kv_cache_scheme={"num_bits": 8}),
    r"config_groups is \{\}": of_config(config_groups={}),
    r"config_groups.group_0 is \['Linear'\]": of_config(config_groups={"group_0": ["Linear"]}),
    "ignore is 'lm_head'; .* a list of names": of_config(ignore="lm_head"),
    r"ignore has 're:\*': nothing to repeat": of_config(ignore=["re:*"]),
    "group_0.targets is None": of_group(targets=None),
    "group_0.format is 'float-quantized'": of_group(format="float-quantized"),
    "group_0.input_activations is None": of_group(input_activations=None),
    "input_activations.dynamic is False": of_group(input_activations={"strategy": "token"}),
    "input_activations.strategy is 'tensor'": of_group(
        input_activations={"strategy": "tensor", "dynamic": True}
    ),
    r"output_activations is \{\}": of_group(output_activations={}),
    "weights is None": of_group(weights=None),
    "weights.num_bits is 4": of_weights(num_bits=4),
    "weights.type is 'float'": of_weights(type="float"),
    "weights.symmetric is False": of_weights(symmetric=False),
    "weights.dynamic is True": of_weights(dynamic=True),
    "weights.strategy is 'tensor'": of_weights(strategy="tensor"),
    "weights.actorder is 'group'": of_weights(actorder="group"),
    "weights.group_size is 0; .* an integer >= 1": of_weights(strategy="group", group_size=0),
    "weights.group_size is 16": of_weights(group_size=16),
    "group_size 20, which does not divide the 32 inputs of model.layers.0": of_weights(
        strategy="group", group_size=20
    ),
}


@pytest.mark.parametrize("message", UNREAD)
def test_other_quantizations_are_refused_by_name(message, tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        dk.load(changed(tmp_path, UNREAD[message]), device="cpu")
    assert str(tmp_path) in str(raised.value)


def without_scale(tensors):
    del tensors[f"{UP}.weight_scale"]


def with_short_scale(tensors):
    tensors[f"{UP}.weight_scale"] = torch.ones(1, 1)


def with_nan_scale(tensors):
    tensors[f"{UP}.weight_scale"][0] = torch.nan


def with_float_weight(tensors):
    tensors[f"{UP}.weight"] = torch.zeros(48, 32)


def with_whole_scale(tensors):
    tensors[f"{UP}.weight_scale"] = torch.ones(48, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without_scale, r"missing: model\.layers\.0\.mlp\.up_proj\.weight_scale"),
        (with_short_scale, r"up_proj\.weight_scale is \[1, 1\], not \[48, 1\]"),
        (with_nan_scale, r"up_proj\.weight_scale holds infinities or NaN"),
        (with_float_weight, r"up_proj\.weight is torch\.float32, not torch\.int8"),
        (with_whole_scale, r"up_proj\.weight_scale is torch\.int32, not torch\.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, message, tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        dk.load(changed(tmp_path, tensors=tensors), device="cpu")


def test_int8_weights_that_config_json_does_not_name_are_refused(tmp_path):
    saved(tmp_path)
    changed(tmp_path, lambda config: config.pop("quantization_config"))
    with pytest.raises(ValueError, match=r"down_proj\.weight is torch\.int8, not torch\.float32"):
        dk.load(tmp_path, device="cpu")


def test_half_a_file_is_refused(tmp_path):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        dk.load(tmp_path, device="cpu")


def test_infinite_weights_are_not_rounded(tmp_path):
    model = copy.deepcopy(tiny_model())
    model.get_submodule(UP).weight.data[3, 4] = torch.inf
    dk.save(model, None, tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight holds infinities or NaN"):
        dk.load(tmp_path, device="cpu", weights="int8")


def test_what_int8_layers_cannot_do_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="merge_projections has no meaning with int8 weights"):
        dk.load(tmp_path, device="cpu", merge_projections=True)
    with pytest.raises(ValueError, match="its weights are int8, which are not for models on meta"):
        read_checkpoint(tmp_path, torch.device("meta"), torch.float32)
