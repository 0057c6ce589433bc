"""Stored weights as CUDA reads them: in rows, not packed. The operators take rows on the CPU too, where these
tests run; tests/cuda/test_stored_weights.py runs them by the CUDA kernels."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dllm_kernels as dk
from dllm_kernels.models import stored_weights
from dllm_kernels.models.fused_layers import fuse_layers
from dllm_kernels.models.gated_layers import gate_layers
from dllm_kernels.models.grouped_layers import GroupedLinear, group_layers
from dllm_kernels.models.saved_weights import saved_state
from dllm_kernels.models.stored_weights import StoredLinear, store_weights
from dllm_kernels.ops.skinny_linear import FEW_ROWS, PackedWeight, RowMajorWeight, dequantize_weight
from tests.sampling.tiny_models import prompts_of, tiny_model

FP8 = torch.float8_e4m3fn
UP = "model.layers.0.mlp.up_proj"
KINDS = ["float32", "bfloat16", "int8"]
OPTIONS = dict(max_new_tokens=16, threshold=0.4)


def layers_of(model) -> list[StoredLinear]:
    return [module for module in model.modules() if isinstance(module, StoredLinear)]


def packed(kind: str):
    model = copy.deepcopy(tiny_model())
    store_weights(model, kind)
    return model


def in_rows(kind: str):
    """A model on the CPU that holds its weights as one on CUDA does."""
    model = packed(kind)
    for layer in layers_of(model):
        layer.stored = RowMajorWeight(*layer.parts())
    return model


@pytest.fixture
def fp8_on_cpu(monkeypatch):
    """Lets models on the CPU hold fp8, which no operator there multiplies by."""
    monkeypatch.setitem(stored_weights.KINDS_ON, "cpu", ("float32", "bfloat16", "int8", "fp8"))


def logits(model):
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


# ---- products ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_writes_what_packed_weights_make_it_write(kind, compiled):
    """The prompts are shorter than FEW_ROWS, where int8 rounds x on the CPU as with packed weights."""
    prompts = prompts_of(5, 12)
    expected = dk.sample(packed(kind), prompts, **OPTIONS)
    assert dk.sample(in_rows(kind), prompts, compile=compiled, **OPTIONS).sequences.equal(expected.sequences)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows(kind, rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    layer = in_rows(kind).get_submodule(UP)
    layer.bias = nn.Parameter(torch.randn(48, generator=generator))
    x = torch.randn(rows, 32, generator=generator).to(dtype)
    weight, scales = layer.parts()
    whole = weight.double() if scales is None else dequantize_weight(weight, scales).double()
    with torch.no_grad():
        got = layer(x)
    expected = x.double() @ whole.T + layer.bias.double()
    size = (x.double().abs() @ whole.abs().T).max()
    assert got.dtype == dtype and bool(((got.double() - expected).abs() < 1e-2 * size).all())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through(kind):
    inputs = [torch.randn(3, 32, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    for x, model in zip(inputs, (packed(kind), in_rows(kind)), strict=True):
        model.get_submodule(UP)(x).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


def test_fp8_is_multiplied_on_cuda_alone():
    layer = StoredLinear.of(*dk.quantize_weight(torch.randn(16, 32), dtype=FP8))
    x = torch.randn(3, 32, requires_grad=True)
    torch.testing.assert_close(layer(x), x @ dequantize_weight(*layer.parts()).T)  # a gradient is recorded
    with torch.no_grad(), pytest.raises(ValueError, match=r"weight must be .* int8, got float8_e4m3fn"):
        layer(x)


# ---- groups ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_parts_of_one_memory(kind):
    model, plain = in_rows(kind), in_rows(kind)
    assert group_layers(model) == 2 * model.config.num_hidden_layers
    attention = model.model.layers[0].self_attn
    storages = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "v_proj")}
    assert len(storages) == 1 and type(attention.k_proj) is GroupedLinear
    torch.testing.assert_close(logits(model), logits(plain), rtol=5e-2, atol=5e-2)
    expected, got = plain.state_dict(), model.state_dict()
    assert expected.keys() == got.keys() and all(got[name].equal(expected[name]) for name in expected)


def test_gate_and_up_are_one_operator_on_the_cpu_alone():
    model = in_rows("int8")
    fuse_layers(model)
    assert gate_layers(model) == 0


def test_weights_in_rows_and_packed_ones_are_no_group():
    model = in_rows("int8")
    for layer in model.model.layers:
        layer.self_attn.q_proj.stored = packed("int8").model.layers[0].self_attn.q_proj.stored
        layer.mlp.up_proj.stored = packed("int8").model.layers[0].mlp.up_proj.stored
    assert group_layers(model) == 0


# ---- devices -----------------------------------------------------------------------------------------------
def test_another_device_lays_weights_out_anew():
    model = packed("int8")
    group_layers(model)
    layer = model.get_submodule(UP)
    assert isinstance(layer.stored, PackedWeight)
    model.to("meta", torch.bfloat16)
    assert isinstance(layer.stored, RowMajorWeight) and type(layer) is StoredLinear
    assert layer.weight.device.type == "meta" and layer.weight.dtype == torch.int8
    assert layer.stored.scales.dtype == torch.float32 and layer.weight.shape == (48, 32)


def test_another_dtype_leaves_them_where_they_are():
    model = in_rows("int8")
    stored = model.get_submodule(UP).stored
    assert model.bfloat16().get_submodule(UP).stored is stored


def test_copies_have_their_own_weights():
    model = in_rows("int8")
    other = copy.deepcopy(model)
    other.get_submodule(UP).weight.zero_()
    assert model.get_submodule(UP).weight.any()


# ---- checkpoints -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_fits_both(kind):
    rows, other = in_rows(kind), packed(kind)
    for layer in layers_of(other):
        weight, scales = layer.parts()
        layer.stored = StoredLinear.of(torch.zeros_like(weight), scales).stored
    other.load_state_dict(rows.state_dict())
    assert all(isinstance(layer.stored, PackedWeight) for layer in layers_of(other))
    assert logits(other).equal(logits(packed(kind)))


def test_int8_comes_back_bit_for_bit(tmp_path):
    model = in_rows("int8")
    group_layers(model)
    dk.save(model, None, tmp_path)
    ours, theirs = saved_state(packed("int8")), saved_state(dk.load(tmp_path, device="cpu")[0])
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_fp8_comes_back_bit_for_bit(tmp_path, fp8_on_cpu):
    model = copy.deepcopy(tiny_model())
    store_weights(model, "fp8")
    group_layers(model)
    dk.save(model, None, tmp_path)
    again, _ = dk.load(tmp_path, device="cpu")
    ours, theirs = saved_state(model), saved_state(again)
    assert ours.keys() == theirs.keys() and again.get_submodule(UP).weight.dtype == FP8
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.contiguous().view(torch.uint8).equal(theirs[name].contiguous().view(torch.uint8))
    stored = dk.load(tmp_path, device="cpu", weights="fp8")[0].get_submodule(UP).weight
    assert stored.view(torch.uint8).equal(again.get_submodule(UP).weight.view(torch.uint8))


def saved_in_fp8(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(stored_weights.KINDS_ON, "cpu", ("fp8",))
        model = copy.deepcopy(tiny_model())
        store_weights(model, "fp8")
    dk.save(model, None, folder)
    return model


def test_fp8_is_written_in_the_format_of_compressed_tensors(tmp_path, monkeypatch):
    saved_in_fp8(tmp_path, monkeypatch)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    assert config["format"] == "float-quantized"
    assert config["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**eight, "dynamic": False, "strategy": "channel", "group_size": None},
            "input_activations": {**eight, "dynamic": True, "strategy": "token"},
        }
    }
    tensors = load_file(tmp_path / "model.safetensors")
    weight, scales = dk.quantize_weight(tiny_model().get_submodule(UP).weight, dtype=FP8)
    assert tensors[f"{UP}.weight"].view(torch.uint8).equal(weight.view(torch.uint8))
    assert tensors[f"{UP}.weight_scale"].equal(scales)


def test_compressed_tensors_reads_fp8(tmp_path, monkeypatch):
    pytest.importorskip("compressed_tensors")
    import transformers

    model = saved_in_fp8(tmp_path, monkeypatch)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        theirs(input_ids=torch.arange(2, 10)[None])  # decompresses
    assert theirs.get_submodule(UP).weight.float().equal(dequantize_weight(*model.get_submodule(UP).parts()))


def test_fp8_checkpoints_become_what_weights_asks_for_on_the_cpu(tmp_path, monkeypatch):
    model = saved_in_fp8(tmp_path, monkeypatch)
    whole = dequantize_weight(*model.get_submodule(UP).parts())
    with pytest.raises(ValueError, match="its weights are fp8, which are not for models on cpu; give"):
        dk.load(tmp_path, device="cpu")
    read = {kind: dk.load(tmp_path, device="cpu", weights=kind)[0].get_submodule(UP) for kind in KINDS}
    assert read["float32"].weight.equal(whole) and read["bfloat16"].weight.equal(whole.bfloat16())
    assert read["int8"].weight.equal(dk.quantize_weight(whole)[0])


def rewritten(folder, config=lambda entries: None, tensors=lambda tensors: None):
    entries = json.loads((folder / "config.json").read_text())
    config(entries["quantization_config"])
    (folder / "config.json").write_text(json.dumps(entries))
    weights = load_file(folder / "model.safetensors")
    tensors(weights)
    save_file(weights, folder / "model.safetensors")


def in_groups(entries):
    entries["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": 16}


def as_integers(entries):
    entries["config_groups"]["group_0"]["weights"]["type"] = "int"


def with_nan(tensors):
    tensors[f"{UP}.weight"].view(torch.uint8)[0, 0] = 0x7F


def as_bfloat16(tensors):
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].bfloat16()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(config=in_groups), "weights.strategy is 'group'; .* 'channel'"),
        (dict(config=as_integers), "weights.type is 'int'; .* 'float'"),
        (dict(tensors=with_nan), r"mlp\.up_proj\.weight holds NaN"),
        (dict(tensors=as_bfloat16), r"up_proj\.weight is torch\.bfloat16, not torch\.float8_e4m3fn"),
    ],
)
def test_other_fp8_is_refused_by_name(change, message, tmp_path, monkeypatch):
    saved_in_fp8(tmp_path, monkeypatch)
    rewritten(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        dk.load(tmp_path, device="cpu", weights="bfloat16")


def test_a_checkpoint_holds_one_kind_of_8_bits(tmp_path):
    model = packed("int8")
    eighths = dk.quantize_weight(tiny_model().get_submodule(UP).weight, dtype=FP8)
    model.set_submodule(UP, StoredLinear.of(*eighths))
    with pytest.raises(ValueError, match="has int8 and fp8 layers; a checkpoint holds one kind"):
        dk.save(model, None, tmp_path)
