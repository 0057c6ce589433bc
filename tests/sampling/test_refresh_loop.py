"""Bidirectional steps in graphs give the tokens of the plain loop, and of the loop that the host steers."""

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.sampling import plain_loop
from dllm_kernels.sampling.graph_loop import RefreshLoop, graph_loop_of
from dllm_kernels.sampling.plan import make_plan
from dllm_kernels.sampling.prompts import gaps
from tests.sampling.test_block_loop import on_device
from tests.sampling.test_oracle import RULES, assert_rows_equal
from tests.sampling.tiny_models import EOS, MASK, prompts_of, tiny_model

OF_THE_HOST = {"bernoulli", "confident_stable", "edit"}
RULES = {
    name: options
    for name, options in RULES.items()
    if dk.SampleConfig(**options).acceptance(1).name not in OF_THE_HOST
}
CACHES = ["prefix", "dual"]


def assert_same_steps(output: dk.SampleOutput, steered: dk.SampleOutput) -> None:
    assert torch.equal(output.sequences, steered.sequences)
    assert torch.equal(output.unmask_step, steered.unmask_step)
    assert torch.equal(output.row_forwards, steered.row_forwards)
    assert output.exact == steered.exact and output.forwards >= steered.forwards


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
@pytest.mark.parametrize("cache", CACHES)
def test_every_rule(cache, options, record_property):
    model, prompts = tiny_model(attention="bidirectional"), prompts_of(3, 25)
    options = dict(max_new_tokens=11, block_size=8, cache=cache, **options)
    config = dk.SampleConfig(**options)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    output, _ = on_device(model, prompts, **options)
    assert_rows_equal(output, rows, record_property)
    assert_same_steps(output, dk.sample(model, prompts, config=config))


@pytest.mark.parametrize("refresh_every", [None, 1, 2, 3])
@pytest.mark.parametrize("suffix_window", [None, 0, 5])
@pytest.mark.parametrize("cache", CACHES)
def test_every_refresh_and_window(cache, suffix_window, refresh_every, record_property):
    """Rows of unequal length at different steps: some renew their cache while others use it."""
    model = tiny_model("llama", "bidirectional", num_key_value_heads=1, head_dim=8)
    prompts = prompts_of(1, 40, 12, seed=6)
    options = dict(max_new_tokens=21, block_size=8, threshold=0.4, cache=cache)
    options |= dict(refresh_every=refresh_every, suffix_window=suffix_window)
    config = dk.SampleConfig(**options)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    output, _ = on_device(model, prompts, **options)
    assert_rows_equal(output, rows, record_property)
    assert_same_steps(output, dk.sample(model, prompts, config=config))


def test_with_a_refresh_in_every_step_nothing_is_approximated():
    model, prompts = tiny_model(attention="bidirectional"), prompts_of(5, 30)
    options = dict(max_new_tokens=20, block_size=8, threshold=0.4)
    output, loop = on_device(model, prompts, cache="dual", refresh_every=1, **options)
    exact = dk.sample(model, prompts, cache="none", **options)
    assert output.exact and torch.equal(output.sequences, exact.sequences)
    assert output.forwards == int(output.row_forwards.sum())
    assert not any(name[0] == "forward" for name in loop.slots.launches.recorded)


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("cache", CACHES)
def test_rows_wait_for_slots(cache, slots, record_property):
    """Unequal prompts, ends by an end token, admission into slots that others have left."""
    model, prompts = tiny_model(attention="bidirectional"), prompts_of(5, 9, 2, 30, 14, 1, 40, seed=2)
    options = dict(max_new_tokens=24, block_size=8, threshold=0.5, cache=cache, eos_ids=(EOS, *range(20, 40)))
    config = dk.SampleConfig(**options)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    output, loop = on_device(model, prompts, max_batch=slots, **options)
    assert_rows_equal(output, rows, record_property)
    assert_same_steps(output, dk.sample(model, prompts, config=config))
    assert len(output.lengths.unique()) > 2
    assert loop.slots.cache.pages_used == 0


@pytest.mark.parametrize("cache", CACHES)
def test_infilling(cache):
    """Blocks without masks are passed over, gaps share blocks with what is given, one canvas has none."""
    model, canvases = tiny_model(attention="bidirectional"), prompts_of(40, 21, 64, 9, seed=3)
    for canvas, masked in zip(
        canvases, [[(2, 5), (18, 21), (39, 40)], [(0, 21)], [(33, 50)], []], strict=True
    ):
        for start, end in masked:
            canvas[start:end] = [MASK] * (end - start)
    options = dict(block_size=8, cache=cache, steps=6, shift=True)
    plan = make_plan(model, None, None, options)
    loop = RefreshLoop(plan, gaps(canvases, plan.fill))
    finished = loop.run()
    expected = dk.infill(model, canvases, **options)
    assert torch.equal(finished.ids, expected.sequences)
    assert torch.equal(finished.unmask_step, expected.unmask_step)


@pytest.mark.parametrize("cache", CACHES)
def test_sliding_windows(cache):
    sliding = dict(sliding_window=11, use_sliding_window=True, max_window_layers=1)
    model, prompts = tiny_model(attention="bidirectional", **sliding), prompts_of(30, 7)
    options = dict(max_new_tokens=20, block_size=8, cache=cache, threshold=0.4)
    assert_same_steps(on_device(model, prompts, **options)[0], dk.sample(model, prompts, **options))


def test_a_block_longer_than_any_row():
    model, prompts = tiny_model(attention="bidirectional"), prompts_of(5, 30)
    for cache in CACHES:
        options = dict(max_new_tokens=12, block_size=2**31 - 1, cache=cache, threshold=0.4)
        assert_same_steps(on_device(model, prompts, **options)[0], dk.sample(model, prompts, **options))


def test_positions_beyond_a_row_are_none_of_the_model():
    """A bucket is longer than its row, and may be longer than a table of learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=120, n_positions=40, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None,
        mask_token_id=MASK, diffusion={"attention": ["bidirectional"]},
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    prompts = prompts_of(24, 3)
    for cache in CACHES:
        options = dict(max_new_tokens=16, block_size=8, cache=cache)
        assert_same_steps(on_device(model, prompts, **options)[0], dk.sample(model, prompts, **options))


def test_a_failing_model_leaves_no_pages():
    model = tiny_model(attention="bidirectional")
    plan = make_plan(model, None, None, dict(max_new_tokens=9, block_size=8, cache="dual"))
    loop = graph_loop_of(plan)(plan, gaps([[MASK] * 9], plan.fill))
    loop.refresh = lambda length: (_ for _ in ()).throw(KeyboardInterrupt)
    before = loop.canvases.ids.clone()
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert loop.slots.cache.pages_used == 0 and torch.equal(loop.canvases.ids, before)


HOSTED = [dict(cache="none"), dict(cache="dual", parity="fast_dllm"), dict(cache="dual", history=True)]


@pytest.mark.parametrize("options", HOSTED)
def test_what_the_host_must_see_is_left_to_it(options):
    assert graph_loop_of(make_plan(tiny_model(attention="bidirectional"), None, None, options)) is None
