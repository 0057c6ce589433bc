"""Keys and values kept between calls: the same tokens, and less to compute."""

import copy
import threading

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.models.stored_weights import StoredLinear, store_weights
from tests.sampling.test_length_dependent import made
from tests.sampling.tiny_models import prompts_of, tiny_model

OPTIONS = dict(max_new_tokens=24, threshold=0.4, stop_on_eos=False)


class Counted:
    """Count the tokens that forwards of `model` compute."""

    def __init__(self, model):
        self.model, self.tokens = model, 0

    def __enter__(self):
        def count(module, arguments, options):
            self.tokens += options["input_ids"].numel()

        self.hook = self.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()


@pytest.mark.parametrize("shift", [False, True])
def test_a_conversation_is_that_without_a_cache(shift):
    model, cache = tiny_model(), dk.PrefixCache(tokens=512)
    (text,) = prompts_of(21)
    for turn in range(4):
        kept = dk.sample(model, [text], prefix_cache=cache, shift=shift, **OPTIONS)
        plain = dk.sample(model, [text], shift=shift, **OPTIONS)
        assert kept.sequences.equal(plain.sequences) and kept.unmask_step.equal(plain.unmask_step)
        assert kept.exact
        text = [*plain.sequences[0].tolist(), *prompts_of(5, seed=turn)[0]]
    assert cache.reused_tokens > 3 * 21


def test_what_an_earlier_call_computed_is_not_computed_again():
    model, cache = tiny_model(), dk.PrefixCache(tokens=512)
    (prompt,) = prompts_of(64)
    computed = []
    with Counted(model) as counted:
        for options in ({}, dict(prefix_cache=cache), dict(prefix_cache=cache)):
            dk.sample(model, [prompt], **OPTIONS, **options)
            computed.append(counted.tokens - sum(computed))
    assert computed[0] == computed[1] == computed[2] + 64
    assert cache.reused_tokens == 64


def test_rows_of_a_batch_reuse_prefixes_of_their_own():
    model, cache = tiny_model(), dk.PrefixCache(tokens=1024)
    prompts = prompts_of(17, 40, 33)
    dk.sample(model, prompts, prefix_cache=cache, **OPTIONS)
    longer = [[*prompt, 1, 2, 3] for prompt in reversed(prompts)]
    kept = dk.sample(model, longer, prefix_cache=cache, **OPTIONS)
    assert kept.sequences.equal(dk.sample(model, longer, **OPTIONS).sequences)
    assert cache.reused_tokens == 16 + 40 + 32


def test_rows_that_part_within_a_page_do_not_disturb_each_other():
    model, cache = tiny_model(), dk.PrefixCache(tokens=1024)
    (prompt,) = prompts_of(40)
    for tail in ([1, 2], [3, 4], [1, 2]):
        text = [*prompt, *tail]
        kept = dk.sample(model, [text], prefix_cache=cache, **OPTIONS)
        assert kept.sequences.equal(dk.sample(model, [text], **OPTIONS).sequences)


def test_the_sequences_used_least_recently_make_room():
    model, cache = tiny_model(), dk.PrefixCache(tokens=192)
    one, two, three = prompts_of(40, 40, 40, seed=5)
    for prompt in (one, two, one, three):
        kept = dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
        assert kept.sequences.equal(dk.sample(model, [prompt], **OPTIONS).sequences)
    before = cache.reused_tokens
    assert before == 40
    dk.sample(model, [two], prefix_cache=cache, **OPTIONS)
    assert cache.reused_tokens == before


def test_a_cache_that_rows_in_flight_fill_keeps_nothing_and_stays_right():
    model, cache = tiny_model(), dk.PrefixCache(tokens=64)
    (prompt,) = prompts_of(33)
    for _ in range(3):
        kept = dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
        assert kept.sequences.equal(dk.sample(model, [prompt], **OPTIONS).sequences)


def test_other_weights_empty_the_cache():
    model, cache = copy.deepcopy(tiny_model()), dk.PrefixCache(tokens=512)
    (prompt,) = prompts_of(40)
    dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    kept = dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    assert kept.sequences.equal(dk.sample(model, [prompt], **OPTIONS).sequences)
    assert cache.reused_tokens == 0
    dk.sample(copy.deepcopy(model), [prompt], prefix_cache=cache, **OPTIONS)
    assert cache.reused_tokens == 0


def test_weights_whose_changes_torch_does_not_count_are_never_reused():
    with torch.inference_mode():
        model = copy.deepcopy(tiny_model())
    cache, (prompt,) = dk.PrefixCache(tokens=512), prompts_of(40)
    dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    with torch.inference_mode():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    kept = dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    assert kept.sequences.equal(dk.sample(model, [prompt], **OPTIONS).sequences)
    assert cache.reused_tokens == 0


@pytest.mark.parametrize("change", ["replaced", "replaced twice", "in place"])
def test_other_stored_weights_empty_the_cache(change):
    model, cache = copy.deepcopy(tiny_model()), dk.PrefixCache(tokens=512)
    store_weights(model, "int8")
    (prompt,) = prompts_of(40)
    dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    reused = cache.reused_tokens
    assert reused > 0
    layer = model.model.layers[0].self_attn.v_proj
    for _ in range(1 + (change == "replaced twice")):
        weight, scales = layer.parts()
        if change == "in place":
            layer.stored.scales.mul_(-1)
        else:
            layer.stored = StoredLinear.of(weight, -2 * scales).stored
    kept = dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    assert cache.reused_tokens == reused
    assert kept.sequences.equal(dk.sample(model, [prompt], **OPTIONS).sequences)


@pytest.mark.parametrize("change", ["block_size", "hook", "buffer"])
def test_other_settings_empty_the_cache(change):
    model, cache = copy.deepcopy(tiny_model()), dk.PrefixCache(tokens=512)
    (prompt,), options = prompts_of(40), dict(OPTIONS)
    dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    if change == "block_size":
        options["block_size"] = 4
    elif change == "hook":
        model.model.layers[0].mlp.register_forward_hook(lambda module, arguments, output: -output)
    else:
        model.model.rotary_emb.inv_freq.mul_(0.5)
    kept = dk.sample(model, [prompt], prefix_cache=cache, **options)
    assert kept.sequences.equal(dk.sample(model, [prompt], **options).sequences)
    assert cache.reused_tokens == 0


def test_a_call_that_is_interrupted_leaves_what_is_final():
    model, cache = tiny_model(), dk.PrefixCache(tokens=512)
    (prompt,) = prompts_of(40)

    def stop(event):
        if event.positions.max() >= 56:  # the blocks before are final
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dk.sample(model, [prompt], prefix_cache=cache, on_round=stop, **OPTIONS)
    assert cache.kept_tokens == 56
    output = dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    assert output.sequences.equal(dk.sample(model, [prompt], **OPTIONS).sequences)
    assert cache.reused_tokens == 40


def test_positions_scaled_by_length_reuse_only_what_was_scaled_alike():
    model, cache = made("longrope", "block_causal"), dk.PrefixCache(tokens=1024)
    for length in (30, 57, 30, 57):  # with 24 more, on both sides of 64 positions
        (prompt,) = prompts_of(length, seed=2)
        kept = dk.sample(model, [prompt[:30] + [5] * (length - 30)], prefix_cache=cache, **OPTIONS)
        plain = dk.sample(made("longrope", "block_causal"), [prompt[:30] + [5] * (length - 30)], **OPTIONS)
        assert kept.sequences.equal(plain.sequences)
    assert cache.reused_tokens > 0


def test_clear_and_repr():
    model, cache = tiny_model(), dk.PrefixCache(tokens=512)
    dk.sample(model, prompts_of(40), prefix_cache=cache, **OPTIONS)
    assert cache.kept_tokens == 56 and "kept_tokens=56" in repr(cache)
    cache.clear()
    assert cache.kept_tokens == 0
    dk.sample(model, prompts_of(40), prefix_cache=cache, **OPTIONS)
    assert cache.reused_tokens == 0


def test_two_calls_at_once_are_refused():
    model, cache = tiny_model(), dk.PrefixCache(tokens=512)
    errors = []

    def again(event):
        def call():
            try:
                dk.sample(model, prompts_of(8), prefix_cache=cache, **OPTIONS)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    dk.sample(model, prompts_of(8), prefix_cache=cache, on_round=again, **OPTIONS)
    assert errors and set(errors) == {"prefix_cache is in use by another call; give each thread its own"}


@pytest.mark.parametrize(
    "attention, options, error, says",
    [
        ("bidirectional", {}, ValueError, "needs a block-causal model"),
        ("block_causal", dict(cache="none"), ValueError, 'cache="block"'),
        ("block_causal", dict(cfg_scale=1.0), ValueError, "no meaning with cfg_scale"),
        ("block_causal", dict(prefix_cache={}), TypeError, "prefix_cache is a dict"),
        ("block_causal", dict(prefix_cache=dk.PrefixCache(tokens=32)), ValueError, "has room for 32 tokens"),
    ],
)
def test_calls_that_cannot_use_a_cache_are_refused(attention, options, error, says):
    given = {"prefix_cache": dk.PrefixCache(tokens=512), **options}
    with pytest.raises(error, match=says):
        dk.sample(tiny_model(attention=attention), prompts_of(40), max_new_tokens=8, **given)


def test_a_size_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="tokens must lie in 32"):
        dk.PrefixCache(tokens=0)
    with pytest.raises(TypeError, match="tokens must be an integer"):
        dk.PrefixCache(tokens=1.5)
