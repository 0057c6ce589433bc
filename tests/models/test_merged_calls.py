"""Calls of merged projections: in any order, interrupted, with gradients, under autocast, compiled."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import dllm_kernels as dk
from dllm_kernels.models.merged_projections import merge_projections
from tests.models.merged_projection_helpers import Products, compiled_layer, logits, plain
from tests.models.test_families import IDS
from tests.sampling.tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("fresh_compiler")


# ---- calls ------------------------------------------------------------------------------------------------
def test_a_part_is_a_slice_of_one_product(group):
    x = torch.randn(2, 3, 6)
    with torch.no_grad(), Products() as seen:
        parts = [module(x) for module in group]
    assert seen.count == 1
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    for module, part in zip(group, parts, strict=True):
        torch.testing.assert_close(part, plain(module, x).detach())


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0), (0, 0, 1, 1, 2), (1,)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_order_of_calls(group, order, mode):
    with mode():
        x = torch.randn(5, 6)
        for index in order:
            torch.testing.assert_close(group[index](x), plain(group[index], x))


def test_another_input_gets_its_own_product(group):
    q, k, v = group
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    with torch.no_grad():
        q(x)
        torch.testing.assert_close(k(y), plain(k, y))
        q(y)
        torch.testing.assert_close(v(x), plain(v, x))
        torch.testing.assert_close(v(y), plain(v, y))


def test_an_input_that_was_changed_in_between(group):
    q, k, _ = group
    x = torch.randn(5, 6)
    with torch.no_grad():
        q(x)
        x += 1
        torch.testing.assert_close(k(x), plain(k, x))


@pytest.mark.parametrize("index", range(3))
def test_a_bias_that_was_taken_away(group, index):
    group[index].bias = None
    x = torch.randn(5, 6)
    with torch.no_grad():
        for module in group:
            torch.testing.assert_close(module(x), plain(module, x))


def test_groups_that_share_an_input():
    """As in layers that compute attention and MLP side by side."""
    parent = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        setattr(parent, name, nn.Linear(6, 4, bias=False))
    assert merge_projections(parent) == 2
    x = torch.randn(5, 6)
    with torch.no_grad(), Products() as seen:
        for name in ("q_proj", "gate_proj", "k_proj", "up_proj", "v_proj"):
            module = getattr(parent, name)
            torch.testing.assert_close(module(x), x @ module.weight.T)
    assert seen.count == 2 + 5  # the test's own


def parts_of(x) -> list[weakref.ref]:
    """Return the parts attached to an input."""
    (parts,) = vars(x).values()
    return [weakref.ref(part) for _, part in parts.values()]


def test_an_interrupted_forward_leaves_nothing(pair):
    _, merged = pair
    left = []

    def interrupt(module, inputs):
        left.extend(parts_of(*inputs))
        raise KeyboardInterrupt

    hook = merged.model.layers[0].self_attn.k_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(merged)
    hook.remove()
    gc.collect()  # frames and their exception
    assert len(left) == 2 and all(part() is None for part in left)


@pytest.fixture
def without_collector():
    gc.disable()
    yield
    gc.enable()


def test_parts_end_with_their_input(group, without_collector):
    x = torch.randn(5, 6)
    with torch.no_grad():
        group[0](x)
        group[1](x)
    left = parts_of(x)
    assert len(left) == 1
    del x
    assert left[0]() is None


def test_a_model_is_freed_with_its_last_name(pair, without_collector):
    def run(model):
        logits(model)
        return weakref.ref(model.model.layers[0].self_attn.q_proj), weakref.ref(model.lm_head)

    for model in pair:
        references = run(copy.deepcopy(model))
        assert [reference() for reference in references] == [None, None]


# ---- gradients and autocast -------------------------------------------------------------------------------
def test_gradients_are_those_of_the_stock_model(pair):
    for model in pair:
        model(IDS).logits.square().mean().backward()
    stock, merged = (dict(model.named_parameters()) for model in pair)
    assert all(torch.equal(merged[name].grad, parameter.grad) for name, parameter in stock.items())


def test_autocast_computes_what_it_does_with_the_stock_model(pair):
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (logits(model) for model in pair)
    assert torch.equal(found, expected)


# ---- compiled ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_layer_is_one_graph(pair, backend):
    stock, merged = pair
    expected = compiled_layer(stock, None)()
    torch.testing.assert_close(compiled_layer(merged, backend)(), expected, atol=1e-4, rtol=1e-4)


def test_a_compiled_layer_under_autocast(pair):
    stock, merged = pair
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = compiled_layer(stock, "aot_eager")(), compiled_layer(merged, "aot_eager")()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_compiled_code_has_one_product_of_a_group(pair):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled_layer(pair[1], keep)()
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("merged_linear" in call for call in calls) == 2
    assert sum("linear" in call for call in calls) == 2 + 2  # o_proj and down_proj


def test_layers_share_what_was_compiled(pair):
    stock, merged = pair
    x = torch.randn(2, 12, 32)
    angles = stock.model.rotary_emb(x, torch.arange(12)[None])
    run = torch.compile(
        lambda layer: layer(x, position_embeddings=angles), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        for number, (layer, expected) in enumerate(zip(merged.model.layers, stock.model.layers, strict=True)):
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                found = run(layer)
            torch.testing.assert_close(found, expected(x, position_embeddings=angles), atol=1e-4, rtol=1e-4)


def test_sampling_with_a_compiled_body():
    stock = tiny_model("qwen3")
    merged = copy.deepcopy(stock)
    merge_projections(merged)
    options = dict(max_new_tokens=12, block_size=8, threshold=0.3)
    found = dk.sample(merged, [[5, 6, 7], [8, 9]], compile=True, **options)
    assert torch.equal(found.sequences, dk.sample(stock, [[5, 6, 7], [8, 9]], **options).sequences)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_the_operator(biased, apart):
    weights, biases = torch.randn(12, 6), torch.randn(12)
    parts = list(weights.split([4, 8])), list(biases.split([4, 8])) if biased else []
    if apart:
        parts = [[part.clone() for part in kind] for kind in parts]
    x = torch.randn(2, 3, 6)
    torch.library.opcheck(torch.ops.dllm_kernels.merged_linear.default, (x, *parts))
    expected = nn.functional.linear(x, weights, biases if biased else None)
    torch.testing.assert_close(torch.ops.dllm_kernels.merged_linear(x, *parts), expected)
