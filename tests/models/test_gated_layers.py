"""gate_layers: gate, up and what joins them as one operator, in MLPs with stored weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dllm_kernels as dk
from dllm_kernels.models.fused_layers import fuse_layers
from dllm_kernels.models.gated_layers import GatedPair, gate_layers
from dllm_kernels.models.stored_weights import StoredLinear, store_weights
from dllm_kernels.ops.skinny_linear import gated_linear, interleaved
from tests.models.copies import logits, through_pickle
from tests.sampling.tiny_models import MASK, prompts_of, tiny_model

KINDS = ("float32", "bfloat16", "int8")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 7, 32, 300]),
    inputs=st.integers(1, 140),
    outputs=st.integers(0, 130),
    kind=st.sampled_from(KINDS),
    x_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_operator_joins_two_products(rows, inputs, outputs, kind, x_dtype, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).to(x_dtype)
    weights = [torch.randn(outputs, inputs, generator=generator) for _ in range(2)]
    biases = torch.randn(2, outputs, generator=generator) if bias else None
    if kind == "int8":
        packed = [dk.pack_weight(*dk.quantize_weight(weight)) for weight in weights]
    else:
        packed = [dk.pack_weight(weight.to(getattr(torch, kind))) for weight in weights]
    got = gated_linear(x, interleaved(*packed), biases)
    assert got.shape == (rows, outputs) and got.dtype == x_dtype
    wide = [dk.skinny_linear(x.float(), weight) for weight in packed]
    gate, up = (one.double() + (0 if biases is None else biases[i]) for i, one in enumerate(wide))
    size = 1 + up.abs() * (1 + gate.abs())
    assert bool(((got.double() - F.silu(gate) * up).abs() <= size * (1e-5 + torch.finfo(x_dtype).eps)).all())
    for rows_alone in (1, 5):
        assert gated_linear(x[:rows_alone], interleaved(*packed), biases).equal(got[:rows_alone])


def test_groups_of_scales():
    weights = [dk.quantize_weight(torch.randn(40, 96), 32) for _ in range(2)]
    x = torch.randn(3, 96)
    packed = [dk.pack_weight(*weight) for weight in weights]
    gate, up = (dk.skinny_linear(x, weight) for weight in packed)
    torch.testing.assert_close(gated_linear(x, interleaved(*packed)), F.silu(gate) * up, rtol=1e-5, atol=1e-5)


def test_opcheck_and_what_is_refused():
    packed = interleaved(*(dk.pack_weight(torch.randn(20, 70)) for _ in range(2)))
    operator = torch.ops.dllm_kernels.packed_gated_linear
    x, bias = torch.randn(5, 70), torch.randn(40)
    torch.library.opcheck(operator, (x, packed.data, 20, bias))
    with pytest.raises(ValueError, match=r"packed_gated_linear: weight must be packed from \[40, 70\]"):
        operator(x, packed.data, 40, bias)
    with pytest.raises(ValueError, match=r"packed_gated_linear: bias.shape\[0\] must be 40"):
        operator(x, packed.data, 20, bias[:20])
    with pytest.raises(NotImplementedError, match="packed_gated_linear"):
        operator(x.requires_grad_(), packed.data, 20, bias).sum().backward()


def stored(kind: str):
    model = copy.deepcopy(tiny_model())
    store_weights(model, kind)
    fuse_layers(model)
    return model


def gated(kind: str):
    model = stored(kind)
    assert gate_layers(model) == model.config.num_hidden_layers
    return model


@pytest.fixture
def calls(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "dllm_kernels.models.gated_layers.gated_linear",
        lambda *arguments: seen.append(1) or gated_linear(*arguments),
    )
    return seen


@pytest.mark.parametrize("change", [lambda model: model, copy.deepcopy, through_pickle])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_model_computes_the_same(kind, change, calls):
    model = change(gated(kind))
    bound = 5e-2 if kind == "int8" else 1e-4  # int8 rounds the product of both again
    torch.testing.assert_close(logits(model), logits(stored(kind)), rtol=bound, atol=bound)
    assert len(calls) == model.config.num_hidden_layers
    mlp = model.model.layers[0].mlp
    memory = {
        part.untyped_storage().data_ptr()
        for part in (mlp.gate_proj.stored.data, mlp.up_proj.stored.data, mlp.gated_pair.whole.data)
    }
    assert len(memory) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_their_weights_and_can_be_called_and_saved(kind, tmp_path):
    plain, model = stored(kind), gated(kind)
    x = torch.randn(3, 32)
    for name, layer in plain.named_modules():
        if isinstance(layer, StoredLinear):
            mine = model.get_submodule(name)
            assert all(a is b is None or a.equal(b) for a, b in zip(layer.parts(), mine.parts(), strict=True))
            if layer.in_features == 32:
                with torch.no_grad():
                    assert mine(x).equal(layer(x))
    dk.save(model, None, tmp_path / "once")
    again, _ = dk.load(tmp_path / "once", device="cpu", weights=kind)
    assert isinstance(again.model.layers[0].mlp.gated_pair, GatedPair)
    dk.save(again, None, tmp_path / "twice")
    twice, _ = dk.load(tmp_path / "twice", device="cpu", weights=kind)
    assert logits(twice).equal(logits(again))


def test_layers_compute_by_themselves_where_they_have_to(calls):
    plain, model = stored("int8"), gated("int8")
    first, second = (one.model.layers[0].mlp for one in (plain, model))
    for mlp in (first, second):
        weight, scales = mlp.up_proj.parts()
        mlp.up_proj.stored = StoredLinear.of(weight, 2 * scales).stored
    torch.testing.assert_close(logits(model), logits(plain), rtol=5e-2, atol=5e-2)
    assert len(calls) == model.config.num_hidden_layers - 1
    assert second.gated_pair.whole is None  # the weights before are not kept
    calls.clear()
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, arguments, output: seen.append(module))
    logits(model)
    assert len(seen) == model.config.num_hidden_layers and calls == []
    model, plain = gated("float32"), stored("float32")
    ids = torch.randint(0, MASK, (1, 8))
    for one in (plain, model):
        one(input_ids=ids).logits.sum().backward()
    assert calls == [] and model.model.embed_tokens.weight.grad.equal(plain.model.embed_tokens.weight.grad)


def test_a_compiled_gated_model_writes_the_same():
    plain, model, prompts = stored("float32"), gated("float32"), prompts_of(5, 12)
    options = dict(max_new_tokens=16, threshold=0.4)
    expected = dk.sample(plain, prompts, **options).sequences
    assert dk.sample(model, prompts, **options).sequences.equal(expected)
    assert dk.sample(model, prompts, compile=True, **options).sequences.equal(expected)


def test_mlps_that_differ_stay_as_they_are():
    model = stored("int8")
    first, second = (layer.mlp for layer in model.model.layers[:2])
    first.gate_proj.register_forward_hook(lambda module, arguments, output: output)
    weight, scales = second.up_proj.parts()
    second.up_proj = StoredLinear.of((weight * scales).bfloat16())
    assert gate_layers(model) == model.config.num_hidden_layers - 2
    model = copy.deepcopy(tiny_model())
    store_weights(model, "int8")
    model.model.layers[0].mlp.act_fn = nn.GELU()
    fuse_layers(model)
    assert gate_layers(model) == model.config.num_hidden_layers - 1
