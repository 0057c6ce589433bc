"""Merged projections: the results of the stock model from fewer products, whatever becomes of the weights."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

import dllm_kernels as dk
from dllm_kernels.models.merged_projections import GROUPS, MergedLinear, merge_projections
from tests.models.checkpoints import EOS, LAYERS, LLADA_FUSED, MASK, PUBLISHED
from tests.models.test_families import ENCODERS, IDS
from tests.sampling.tiny_models import tiny_model

CHECKPOINTS = {**PUBLISHED, "llada, fused": LLADA_FUSED}
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Products(TorchDispatchMode):
    """Counts matrix products with weights."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in PRODUCTS
        return function(*args, **(kwargs or {}))


def groups_of(model):
    """(modules of a group, by order) for every group in a model."""
    for parent in model.modules():
        for names in GROUPS:
            if all(hasattr(parent, name) for name in names):
                yield tuple(getattr(parent, name) for name in names)


def is_one_storage(group) -> bool:
    kinds = [[module.weight for module in group]]
    if group[0].bias is not None:
        kinds.append([module.bias for module in group])
    return all(len({part.untyped_storage().data_ptr() for part in parts}) == 1 for parts in kinds)


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_alike(model, other) -> None:
    torch.testing.assert_close(logits(model), logits(other), atol=1e-4, rtol=1e-4)


@pytest.fixture(params=["llama", "qwen3"])
def pair(request):
    """A stock model and the same one merged."""
    stock = copy.deepcopy(tiny_model(request.param))
    merged = copy.deepcopy(stock)
    assert merge_projections(merged) == 2 * len(merged.model.layers)
    return stock, merged


@pytest.fixture
def group():
    """Three merged projections, as a model's attention calls them."""
    parent = nn.Module()
    for name, size in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
        setattr(parent, name, nn.Linear(6, size))
    assert merge_projections(parent) == 1
    return parent.q_proj, parent.k_proj, parent.v_proj


def plain(module, x):
    return nn.functional.linear(x, module.weight, module.bias)


# ---- every family -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_merged_checkpoint_computes_what_the_stock_model_does(name, tmp_path):
    folder = CHECKPOINTS[name].write(tmp_path)
    stock, _ = dk.load(folder, device="cpu")
    merged, _ = dk.load(folder, device="cpu", merge_projections=True)
    groups = list(groups_of(merged))
    assert len(groups) == 2 * LAYERS and all(map(is_one_storage, groups))
    assert all(type(module) is MergedLinear for group in groups for module in group)
    for model, products in ((stock, 7), (merged, 4)):
        with Products() as seen:
            logits(model)
        assert seen.count == products * LAYERS + 1 + seen_in_rotary(model)
    assert_alike(stock, merged)
    options = dict(max_new_tokens=12, block_size=4, threshold=0.2, mask_id=MASK, eos_ids=EOS)
    found, expected = (dk.sample(model, [[5, 6, 7], [8, 9]], **options) for model in (merged, stock))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.unmask_step, expected.unmask_step)


def seen_in_rotary(model) -> int:
    """The rotary angles are a product too."""
    with Products() as seen:
        model.model.rotary_emb(torch.zeros(1, 1, 4), torch.arange(4)[None])
    return seen.count


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_encoders(name, tmp_path):
    torch.manual_seed(2)
    stock = transformers.AutoModelForMaskedLM.from_config(ENCODERS[name]).eval()
    stock.save_pretrained(tmp_path)
    merged, _ = dk.load(tmp_path, device="cpu", merge_projections=True)
    groups = list(groups_of(merged))
    assert len(groups) == 4 and all(map(is_one_storage, groups))
    ids = IDS.masked_fill(IDS == 1, 2)
    torch.testing.assert_close(logits(merged, ids), logits(stock, ids), atol=1e-5, rtol=1e-4)
    options = dict(max_new_tokens=10, block_size=5, threshold=0.02, eos_ids=EOS, mask_id=MASK)
    found, expected = (dk.sample(model, [[5, 6, 7], [8, 9]], **options) for model in (merged, stock))
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("name", ["modernbert", "gpt2"])
def test_a_model_with_fused_projections_stays_as_it_is(name, tmp_path):
    config = ENCODERS.get(name) or transformers.GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=2)
    config.diffusion, config.mask_token_id = {"attention": ["bidirectional"]}, MASK
    auto = transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path)
    model, _ = dk.load(tmp_path, device="cpu", merge_projections=True)
    assert merge_projections(model) == 0
    assert not any(type(module) is MergedLinear for module in model.modules())


# ---- files ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("name", ["llada", "Dream"])
def test_it_is_saved_as_the_stock_model_is(name, shard_size, tmp_path):
    folder = PUBLISHED[name].write(tmp_path / "published")
    for merge in (False, True):
        model, _ = dk.load(folder, device="cpu", merge_projections=merge)
        for layout in (None, name):
            dk.save(model, None, tmp_path / f"{merge}" / f"{layout}", layout, max_shard_size=shard_size)
    contents = [
        {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for path in (tmp_path / "False", tmp_path / "True")
    ]
    assert contents[0] == contents[1]
    assert any(file.name == "model.safetensors.index.json" for file in contents[0]) == (shard_size == "10KB")


def test_it_has_the_parameters_of_the_stock_model(pair):
    stock, merged = pair
    mine, theirs = dict(merged.named_parameters()), dict(stock.named_parameters())
    assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert list(merged.state_dict()) == list(stock.state_dict())
    assert all(type(parameter) is nn.Parameter and parameter.requires_grad for parameter in mine.values())


# ---- weights that change or move ---------------------------------------------------------------------------
def load_state_dict(model, assign=False):
    model.load_state_dict({name: 0.5 * w for name, w in model.state_dict().items()}, assign=assign)


def replace_data(model):
    """As peft does when it merges an adapter safely."""
    for group in groups_of(model):
        group[1].weight.data = 0.5 * group[1].weight.data


def replace_parameter(model):
    for group in groups_of(model):
        group[0].weight = nn.Parameter(0.5 * group[0].weight.detach())


def change_in_place(model):
    with torch.no_grad():
        for group in groups_of(model):
            group[-1].weight.mul_(0.5)


def halve_by_parametrization(model):
    class Half(nn.Module):
        def forward(self, weight):
            return 0.5 * weight

    for group in groups_of(model):
        parametrize.register_parametrization(group[1], "weight", Half())


def prune_first(model):
    for group in groups_of(model):
        prune.l1_unstructured(group[0], "weight", amount=0.5)


CHANGES = {
    "load_state_dict": load_state_dict,
    "load_state_dict, assign": lambda model: load_state_dict(model, assign=True),
    "data replaced": replace_data,
    "parameter replaced": replace_parameter,
    "in place": change_in_place,
    "parametrization": halve_by_parametrization,
    "pruned": prune_first,
    "moved": lambda model: model.to(torch.float64),
    "one moved": lambda model: model._apply(torch.clone) and None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_take_effect(pair, change):
    stock, merged = pair
    before = logits(merged)
    for model in pair:
        change(model)
    assert_alike(merged, stock)
    moved = change in (CHANGES["moved"], CHANGES["one moved"])
    assert moved == torch.allclose(logits(merged).float(), before, atol=1e-4)


def test_compiled_code_sees_changed_weights_too(pair):
    stock, compiled = compiled_layer(pair[0], None), compiled_layer(pair[1], "aot_eager")
    before = compiled()
    for change in (change_in_place, replace_data):
        for model in pair:
            change(model)
        with torch._dynamo.config.patch(error_on_recompile=True):
            after = compiled()
        torch.testing.assert_close(after, stock(), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(after, before)


@pytest.mark.parametrize("move", [copy.deepcopy, lambda model: model.to(torch.bfloat16)], ids=["copy", "to"])
def test_a_copied_or_moved_model_is_merged_again_by_another_call(pair, move):
    stock, merged = (move(model) for model in pair)
    assert not any(map(is_one_storage, groups_of(merged)))
    torch.testing.assert_close(logits(merged), logits(stock), rtol=0, atol=0)
    assert merge_projections(merged) == len(list(groups_of(merged)))
    assert all(map(is_one_storage, groups_of(merged)))
    torch.testing.assert_close(logits(merged), logits(stock), atol=1e-4, rtol=1.6e-2)


def test_a_copy_shares_nothing_with_its_original(pair):
    _, merged = pair
    before, other = logits(merged), copy.deepcopy(merged)
    merge_projections(other)
    change_in_place(other)
    assert torch.equal(logits(merged), before)


def test_merging_twice_moves_nothing(pair):
    _, merged = pair
    places = [parameter.data_ptr() for parameter in merged.parameters()]
    assert merge_projections(merged) == len(list(groups_of(merged)))
    assert places == [parameter.data_ptr() for parameter in merged.parameters()]


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
    """What is left with an input."""
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


# ---- gradients and autocast ------------------------------------------------------------------------------
def test_gradients_are_those_of_the_stock_model(pair):
    for model in pair:
        model(IDS).logits.square().mean().backward()
    stock, merged = (dict(model.named_parameters()) for model in pair)
    assert all(torch.equal(merged[name].grad, parameter.grad) for name, parameter in stock.items())


def test_autocast_computes_what_it_does_with_the_stock_model(pair):
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (logits(model) for model in pair)
    assert torch.equal(found, expected)


# ---- what is left alone ------------------------------------------------------------------------------------
def with_hook(parent):
    parent.k_proj.register_forward_hook(lambda *_: None)


def with_subclass(parent):
    parent.v_proj = type("Quantized", (nn.Linear,), {})(6, 4)


def with_partial_bias(parent):
    parent.k_proj = nn.Linear(6, 4, bias=False)


def with_other_dtype(parent):
    parent.k_proj.to(torch.float64)


def with_other_input(parent):
    parent.v_proj = nn.Linear(7, 4)


def with_tied_weight(parent):
    parent.other = nn.Linear(6, 4)
    parent.other.weight = parent.k_proj.weight


def with_missing_module(parent):
    del parent.v_proj


def with_own_forward(parent):
    parent.q_proj.forward = parent.q_proj.forward


@pytest.mark.parametrize(
    "change",
    [with_hook, with_subclass, with_partial_bias, with_other_dtype, with_other_input, with_tied_weight,
     with_missing_module, with_own_forward],
)  # fmt: skip
def test_groups_of_other_modules_are_left_alone(change):
    parent = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(parent, name, nn.Linear(6, 4))
    change(parent)
    assert merge_projections(parent) == 0
    assert not any(type(module) is MergedLinear for module in parent.modules())


class Adapter(nn.Module):
    """A wrapper that calls the layer beneath it and adds to its result in place."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        torch.manual_seed(3)
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        output = self.base_layer(x)
        return output.add_(self.up(self.down(x)))


@pytest.mark.parametrize("names", [["q_proj"], ["k_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_adapters_put_on_later(pair, names):
    stock, merged = pair
    before = logits(stock)
    for model in pair:
        for parent in list(model.modules()):
            for name in names:
                if isinstance(getattr(parent, name, None), nn.Linear):
                    setattr(parent, name, Adapter(getattr(parent, name)))
    assert_alike(merged, stock)
    assert not torch.allclose(logits(stock), before)


# ---- compiled ----------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_layer(model, backend):
    """A call of the first decoder layer, always on the same input; backend None: not compiled."""
    layer = model.model.layers[0]
    x = torch.randn(2, 12, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    angles = model.model.rotary_emb(x, torch.arange(12)[None])
    run = torch.compile(layer, fullgraph=True, backend=backend) if backend else layer

    def call():
        with torch.no_grad():
            return run(x, position_embeddings=angles)

    return call


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
