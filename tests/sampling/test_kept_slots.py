"""What is kept between calls serves those it fits, and no others. Here on the CPU, where a launch that was
kept calls the function of an earlier call again, as a graph would replay it."""

import copy
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.sampling import slots
from dllm_kernels.sampling.graphs import Launches
from tests.sampling.test_block_loop import on_device
from tests.sampling.tiny_models import prompts_of, tiny_model


@pytest.fixture
def recorded(monkeypatch) -> list:
    """Names of what is recorded, while slots are kept on the CPU too."""
    names, record = [], Launches.record

    def counted(self, name, run):
        names.append(name) if name not in self.recorded else None
        record(self, name, run)

    monkeypatch.setattr(slots, "KEPT_ON", ("cpu",))
    monkeypatch.setattr(Launches, "record", counted)
    return names


KINDS = {
    "block": ("block_causal", "block"),
    "prefix": ("bidirectional", "prefix"),
    "dual": ("bidirectional", "dual"),
}
OPTIONS = dict(max_new_tokens=19, block_size=8, threshold=0.3)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model_and_options(request):
    attention, cache = request.param
    model = copy.deepcopy(tiny_model(attention=attention))
    yield model, OPTIONS | dict(cache=cache)
    slots.forget(model)


def assert_right(model, prompts, **options) -> None:
    output, _ = on_device(model, prompts, **options)
    expected = dk.sample(model, prompts, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.unmask_step, expected.unmask_step)
    assert torch.equal(output.row_forwards, expected.row_forwards)


def test_another_call_records_nothing(recorded, model_and_options):
    """Other prompts of other lengths, more of them than slots, other steps and numbers of new tokens."""
    model, options = model_and_options
    assert_right(model, prompts_of(9, 20), **options)
    before = list(recorded)
    assert before
    assert_right(model, prompts_of(31, 2, seed=1), **options)
    assert_right(model, prompts_of(3, 17, 9, 24, seed=2), max_batch=2, **options)
    assert_right(model, prompts_of(5, 6, seed=3), **options | dict(max_new_tokens=11, seed=4))
    assert recorded == before


def test_another_call_of_a_compiled_model_records_nothing(recorded, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = copy.deepcopy(tiny_model(attention="bidirectional"))
    options = OPTIONS | dict(cache="dual", compile=True)
    for seed in range(2):
        on_device(model, prompts_of(9, seed=seed), **options)
    slots.forget(model)
    assert len(recorded) == len({*recorded}) == 3


CHANGES = {
    "rule": dict(threshold=0.5),
    "more slots": dict(max_batch=3),
    "longer rows": dict(max_new_tokens=90),
    "noise": dict(temperature=0.7),
    "shift": dict(shift=True),
    "guidance": dict(cfg_scale=0.5),
    "end tokens": dict(eos_ids=(3, 5, 8, 30)),
    "suppressed tokens": dict(suppress_tokens=(3, 7)),
    "filter": dict(top_k=4),
}


def test_other_options_record_anew(recorded, model_and_options):
    model, options = model_and_options
    options, prompts = options | dict(max_new_tokens=9, max_batch=2), prompts_of(9, 20, 4, seed=1)
    on_device(model, prompts, **options)
    for name, change in CHANGES.items():
        recorded.clear()
        assert_right(model, prompts, **options | change)
        assert recorded, name
        on_device(model, prompts, **options)


def test_a_longer_row_records_anew_where_pages_suffice(recorded, model_and_options):
    model, options = model_and_options
    options |= dict(max_new_tokens=9)
    assert_right(model, prompts_of(100, 100), **options)
    recorded.clear()
    assert_right(model, prompts_of(150, 3), **options)
    assert recorded


def test_another_seed_records_anew_where_something_is_drawn(recorded, model_and_options):
    model, options = model_and_options
    for drawn in (dict(temperature=0.7), dict(threshold=None, alg_temp=0.5), dict(confidence="random")):
        assert_right(model, prompts_of(9), **options | drawn | dict(seed=1))
        recorded.clear()
        assert_right(model, prompts_of(9), **options | drawn | dict(seed=2))
        assert recorded


def replace_a_weight(model):
    model.lm_head.weight.data = model.lm_head.weight.data.roll(1, 0)


def replace_a_module(model):
    model.model.norm = copy.deepcopy(model.model.norm)
    model.model.norm.weight.data.neg_()


def move_the_weights(model):
    model.double().float()


def add_a_hook(model):
    model.model.norm.register_forward_hook(lambda module, inputs, output: -output)


def change_a_setting(model):
    model.model.norm.variance_epsilon = 1e3


@pytest.mark.parametrize(
    "change", [replace_a_weight, replace_a_module, move_the_weights, add_a_hook, change_a_setting]
)
def test_another_model_of_the_same_name_records_anew(recorded, model_and_options, change):
    model, options = model_and_options
    assert_right(model, prompts_of(9, 20), **options)
    change(model)
    recorded.clear()
    assert_right(model, prompts_of(9, 20), **options)
    assert recorded


def test_weights_that_change_in_place_are_those_of_the_next_call(recorded, model_and_options):
    model, options = model_and_options
    assert_right(model, prompts_of(9, 20), **options)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    recorded.clear()
    assert_right(model, prompts_of(9, 20), **options)
    assert not recorded


def test_a_call_that_was_interrupted_leaves_nothing(recorded, model_and_options):
    model, options = model_and_options
    assert_right(model, prompts_of(9, 20), **options)
    calls = []

    def interrupt(*_):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        on_device(model, prompts_of(9, 20), **options)
    hook.remove()
    recorded.clear()
    assert_right(model, prompts_of(9, 20), **options)
    assert recorded


class Model(torch.nn.Module):
    """Something that slots may be kept for."""


class Slots:
    """As much of DeviceSlots as is looked at."""

    device = torch.device("cpu")

    def __init__(self, pages: int = 4):
        self.cache = SimpleNamespace(pages=pages)


def used(model, key="key", pages=4, make=Slots):
    with slots.slots_of(SimpleNamespace(model=model), (key,), pages, make) as found:
        return found


def test_one_call_beside_another_has_slots_of_its_own(recorded):
    model = Model()
    with slots.slots_of(SimpleNamespace(model=model), ("key",), 4, Slots) as first:
        second = used(model)
        assert second is not first
    assert used(model) is first  # the latest to be returned


def test_slots_with_pages_enough_serve(recorded):
    model = Model()
    first = used(model)
    assert used(model, pages=3) is first
    more = used(model, pages=5, make=lambda: Slots(5))
    assert more is not first and used(model) is more


def test_old_slots_are_gone_before_new_ones_are_made(recorded):
    model, seen = Model(), []
    used(model)
    used(model, "other", make=lambda: seen.append(model in slots._KEPT) or Slots())
    assert seen == [False]


def test_nothing_outlives_its_model(recorded):
    model = Model()
    kept = weakref.ref(used(model))
    assert kept() is not None
    del model
    gc.collect()
    assert kept() is None


def test_what_is_forgotten_is_made_anew(recorded):
    model = Model()
    first = used(model)
    slots.forget(model)
    assert used(model) is not first


def test_on_a_cpu_nothing_is_kept():
    model = Model()
    assert used(model) is not used(model)
