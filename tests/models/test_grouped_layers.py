"""group_layers: stored layers of one input as one product."""

import copy

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.models.grouped_layers import GroupedLinear, group_layers
from dllm_kernels.models.stored_weights import StoredLinear, store_weights
from tests.models.copies import logits, through_pickle
from tests.sampling.tiny_models import MASK, prompts_of, tiny_model

KINDS = ("float32", "bfloat16", "int8")


def stored(kind: str, **options):
    model = copy.deepcopy(tiny_model(**options))
    store_weights(model, kind)
    return model


def grouped(kind: str):
    model = stored(kind)
    assert group_layers(model) == 2 * model.config.num_hidden_layers
    return model


@pytest.fixture
def products(monkeypatch):
    """The outputs of each product that a group computes as one."""
    seen = []

    def recorded(x, weight, bias=None):
        seen.append(weight.outputs)
        return dk.skinny_linear(x, weight, bias)

    monkeypatch.setattr("dllm_kernels.models.grouped_layers.skinny_linear", recorded)
    return seen


# Activations of parts that are strided may be rounded otherwise, and int8 rounds x again.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-4, "int8": 5e-2}


@pytest.mark.parametrize("change", [lambda model: model, copy.deepcopy, through_pickle])
@pytest.mark.parametrize("kind", KINDS)
def test_a_grouped_model_computes_the_same(kind, change, products):
    model = change(grouped(kind))
    got, expected = logits(model), logits(stored(kind))
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[kind], atol=TOLERANCE[kind])
    up, attention = model.model.layers[0].mlp.up_proj, model.model.layers[0].self_attn
    heads = sum(getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj"))
    assert products == [heads, 2 * up.out_features] * model.config.num_hidden_layers


@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_their_weights_and_memory_is_shared(kind):
    plain, model = stored(kind), grouped(kind)
    for name, layer in plain.named_modules():
        if isinstance(layer, StoredLinear):
            mine = model.get_submodule(name)
            assert all(a is b is None or a.equal(b) for a, b in zip(layer.parts(), mine.parts(), strict=True))
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj) is type(attention.v_proj) is GroupedLinear
    storages = {
        layer.stored.data.untyped_storage().data_ptr()
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert storages == {attention.q_proj.whole[1].data.untyped_storage().data_ptr()}
    assert group_layers(model) == 0  # none is left


def test_a_replaced_weight_is_used(products):
    plain, model = stored("int8"), grouped("int8")
    for one in (plain, model):
        layer = one.model.layers[0].mlp.up_proj
        weight, scales = layer.parts()
        layer.stored = StoredLinear.of(weight, 2 * scales).stored
    torch.testing.assert_close(logits(model), logits(plain), rtol=5e-2, atol=5e-2)
    assert len(products) == 2 * model.config.num_hidden_layers - 1
    products.clear()
    model.load_state_dict(stored("int8").state_dict())
    assert logits(model).equal(logits(stored("int8"))) and products == []


def test_gradients_compiled_code_and_other_inputs_take_the_layers_alone(products):
    plain, model = stored("float32"), grouped("float32")
    ids = torch.randint(0, MASK, (1, 8))
    for one in (plain, model):
        one(input_ids=ids).logits.sum().backward()
    embeddings = "model.embed_tokens.weight"
    assert model.get_parameter(embeddings).grad.equal(plain.get_parameter(embeddings).grad)
    assert products == []
    first, second = model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj
    x, other = torch.randn(2, 3, 32)
    with torch.no_grad():
        first(x)
        assert second(other).equal(plain.model.layers[0].mlp.up_proj(other))
        x.add_(1)
        assert second(x).equal(plain.model.layers[0].mlp.up_proj(x))
    prompts, options = prompts_of(5, 12), dict(max_new_tokens=16, threshold=0.4)
    expected = dk.sample(plain, prompts, **options).sequences
    assert dk.sample(model, prompts, compile=True, **options).sequences.equal(expected)
    assert dk.sample(model, prompts, **options).sequences.equal(expected)


def test_layers_that_differ_or_have_hooks_stay_apart():
    model = stored("int8")
    layer = model.model.layers[0]
    layer.self_attn.k_proj.register_forward_hook(lambda module, arguments, output: output)
    weight, scales = layer.mlp.up_proj.parts()
    layer.mlp.up_proj = StoredLinear.of((weight * scales).bfloat16())
    narrow = model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        weight, scales = getattr(narrow, name).parts()
        setattr(narrow, name, StoredLinear.of(weight[:40].contiguous(), scales[:40].contiguous()))
    assert group_layers(model) == 2 * model.config.num_hidden_layers - 3


def test_a_loaded_model_is_grouped(tmp_path):
    dk.save(tiny_model(), None, tmp_path)
    model, _ = dk.load(tmp_path, device="cpu", weights="int8")
    assert type(model.model.layers[0].self_attn.q_proj) is GroupedLinear
    dk.save(model, None, tmp_path / "int8")
    again, _ = dk.load(tmp_path / "int8", device="cpu")
    assert type(again.model.layers[0].self_attn.q_proj) is GroupedLinear
    assert logits(again).equal(logits(model))
