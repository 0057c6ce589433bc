"""Merged projections: the results of the stock model from fewer products, whatever becomes of the weights."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize, prune

import dllm_kernels as dk
from dllm_kernels.models.merged_projections import MergedLinear, merge_projections
from tests.models.merged_projection_helpers import (
    Products,
    assert_alike,
    compiled_layer,
    groups_of,
    is_one_storage,
    logits,
)
from tests.models.published_checkpoints import EOS, LAYERS, LLADA_FUSED, MASK, PUBLISHED
from tests.models.test_families import ENCODERS, IDS

CHECKPOINTS = {**PUBLISHED, "llada, fused": LLADA_FUSED}


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


# ---- weights that change or move --------------------------------------------------------------------------
def load_state_dict(model, assign=False):
    model.load_state_dict({name: 0.5 * w for name, w in model.state_dict().items()}, assign=assign)


def replace_data(model):
    """Replace the data as peft does when it merges an adapter safely."""
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


# ---- what is left alone -----------------------------------------------------------------------------------
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
