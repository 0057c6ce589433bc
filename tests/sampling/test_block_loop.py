"""Block-causal steps in graphs give the tokens of the plain loop, and of the loop that the host steers."""

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.sampling import graph_loop, plain_loop, views
from dllm_kernels.sampling.graph_loop import BlockLoop, GraphLoop, graph_loop_of
from dllm_kernels.sampling.output import completion_output
from dllm_kernels.sampling.plan import make_plan
from dllm_kernels.sampling.prompts import completions, gaps
from tests.sampling.test_oracle import assert_rows_equal
from tests.sampling.tiny_models import EOS, MASK, prompts_of, tiny_model

RULES = {
    "one token a step": dict(),
    "steps in all": dict(steps=17),
    "more steps than masks": dict(steps_per_block=20),
    "threshold": dict(threshold=0.3),
    "factor": dict(factor=1.2),
    "random": dict(steps_per_block=4, confidence="random", seed=3),
    "noise": dict(threshold=0.3, temperature=0.8, seed=5),
    "suppressed tokens": dict(threshold=0.3, suppress_tokens=tuple(range(0, 110, 2))),
    "quota or threshold": dict(rule="quota_or_threshold", threshold=0.5, steps_per_block=3),
    "entropy bound": dict(entropy_bound=1.0),
    "top-p and noise": dict(steps_per_block=4, top_p=0.9, temperature=0.7, confidence="entropy"),
    "top-k": dict(threshold=0.3, top_k=3, confidence="margin"),
    "dllm schedule": dict(steps_per_block=5, schedule="dllm"),
    "dllm's cosine schedule": dict(steps_per_block=5, schedule="dllm_cosine"),
    "dream schedule": dict(steps_per_block=3, schedule="dream", eps=0.01),
    "drawn quotas": dict(steps_per_block=5, schedule="dllm", stochastic=True, seed=3),
    "drawn positions": dict(steps_per_block=3, alg_temp=0.5, seed=2),
    "guidance": dict(threshold=0.4, cfg_scale=0.7),
    "guidance that keeps tokens": dict(steps_per_block=5, cfg_scale=2.0, cfg_keep_tokens=tuple(range(60))),
    "shift": dict(threshold=0.3, shift=True),
    "shift and guidance": dict(steps_per_block=5, shift=True, cfg_scale=0.5),
}


@pytest.fixture(params=[graph_loop.FEW_TOKENS, 0], ids=["one graph", "two graphs"], autouse=True)
def graphs(request, monkeypatch):
    """As for the few rows of these tests, and as for many."""
    monkeypatch.setattr(graph_loop, "FEW_TOKENS", request.param)


def on_device(model, prompts, **options) -> tuple[dk.SampleOutput, GraphLoop]:
    plan = make_plan(model, None, None, options)
    canvases = completions(prompts, plan)
    loop = graph_loop_of(plan)(plan, canvases, plan.eos_ids if plan.config.stop_on_eos else ())
    return completion_output(canvases, loop.run(), plan.eos_ids, None), loop


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_every_rule(options, record_property):
    model, prompts = tiny_model(), prompts_of(3, 9, 25)
    config = dk.SampleConfig(max_new_tokens=21, block_size=8, **options)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    output, _ = on_device(model, prompts, max_new_tokens=21, block_size=8, **options)
    assert_rows_equal(output, rows, record_property)
    steered = dk.sample(model, prompts, config=config)
    assert torch.equal(output.row_forwards, steered.row_forwards)
    assert torch.equal(output.unmask_step, steered.unmask_step)


@pytest.mark.parametrize("graphs", [128], indirect=True)
@pytest.mark.parametrize("rows", [5, 20])
def test_with_many_rows_steps_within_a_block_compute_it_alone_and_write_nothing(rows, monkeypatch):
    steps, writes, launch = [], [], BlockLoop.launch

    def watched(self):
        steps.append((self.queries, int(self.slots.rows.q_lengths.max())))
        launch(self)

    monkeypatch.setattr(BlockLoop, "launch", watched)
    attend = views.DeviceView.attend

    def watched_attend(view, *arguments):
        if view.write_positions is not None:
            writes.append(steps[-1][0])
        return attend(view, *arguments)

    monkeypatch.setattr(views.DeviceView, "attend", watched_attend)
    model, prompts = tiny_model(), prompts_of(*range(1, 2 * rows, 2), seed=3)
    options = dict(max_new_tokens=19, block_size=8, threshold=0.2)
    output, _ = on_device(model, prompts, **options)
    assert torch.equal(output.sequences, dk.sample(model, prompts, **options).sequences)
    if rows == 5:
        assert {queries for queries, _ in steps} == {16}
    else:
        assert all(queries == (8 if longest <= 8 else 16) for queries, longest in steps)
        assert {queries for queries, _ in steps} == {8, 16} and {*writes} == {16}


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_rows_wait_for_slots(slots, record_property):
    """Unequal prompts, ends by an end token, admission into slots that others have left."""
    model, prompts = tiny_model("llama", num_key_value_heads=1), prompts_of(1, 40, 33, 4, 17, 8, 16, seed=2)
    options = dict(max_new_tokens=19, block_size=8, threshold=0.2, eos_ids=(EOS, 5, 17, 60))
    config = dk.SampleConfig(**options)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    output, loop = on_device(model, prompts, max_batch=slots, **options)
    assert_rows_equal(output, rows, record_property)
    assert loop.slots.cache.pages_used == 0


def test_equal_prompts_share_pages(record_property):
    model = tiny_model()
    (prompt,) = prompts_of(29)
    prompts = [prompt, prompt, prompt[:20]]
    output, _ = on_device(model, prompts, max_new_tokens=9, block_size=8)
    config = dk.SampleConfig(max_new_tokens=9, block_size=8)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    assert_rows_equal(output, rows, record_property)


def test_infilling(record_property):
    """Leading blocks without masks are caught up with; blocks between gaps too."""
    model, (canvas,) = tiny_model(), prompts_of(75, seed=4)
    for start, end in ((37, 45), (46, 47), (70, 75)):
        canvas[start:end] = [MASK] * (end - start)
    plan = make_plan(model, None, None, dict(block_size=8))
    loop = BlockLoop(plan, gaps([canvas], plan.fill))
    finished = loop.run()
    expected = dk.infill(model, [canvas], block_size=8)
    assert torch.equal(finished.ids, expected.sequences)
    assert torch.equal(finished.unmask_step, expected.unmask_step)


def test_sliding_windows(record_property):
    model = tiny_model(sliding_window=11, use_sliding_window=True, max_window_layers=1)
    prompts = prompts_of(30, 7)
    expected = dk.sample(model, prompts, max_new_tokens=20, block_size=8, cache="none")
    output, _ = on_device(model, prompts, max_new_tokens=20, block_size=8)
    assert torch.equal(output.sequences, expected.sequences)


def test_a_failing_model_leaves_no_pages():
    model = tiny_model()
    plan = make_plan(model, None, None, dict(max_new_tokens=9, block_size=8))
    loop = BlockLoop(plan, completions(prompts_of(9), plan))
    loop.run_step = lambda queries: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert loop.slots.cache.pages_used == 0


@pytest.mark.parametrize("guided", [dict(), dict(cfg_scale=0.8)], ids=["plain", "guided"])
def test_shift_where_prompts_are_shared_or_caught_up_with(guided, record_property):
    """The output before a block comes from a step that catches up, or from a block's first step."""
    model = tiny_model()
    (prompt,) = prompts_of(29, seed=5)
    prompts = [prompt, prompt[:24], prompt, *prompts_of(1, 8, 16, seed=6)]
    options = dict(max_new_tokens=17, block_size=8, threshold=0.3, shift=True, max_batch=3, **guided)
    config = dk.SampleConfig(**options)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    output, _ = on_device(model, prompts, **options)
    assert_rows_equal(output, rows, record_property)


def test_shift_and_infilling():
    """Steps compute what stands before the first gap, block by block, and keep its last output."""
    model, (canvas,) = tiny_model(), prompts_of(75, seed=4)
    for start, end in ((0, 2), (40, 45), (70, 75)):
        canvas[start:end] = [MASK] * (end - start)
    plan = make_plan(model, None, None, dict(block_size=8, shift=True))
    loop = BlockLoop(plan, gaps([canvas], plan.fill))
    finished = loop.run()
    expected = dk.infill(model, [canvas], block_size=8, shift=True)
    assert torch.equal(finished.ids, expected.sequences)
    assert torch.equal(finished.unmask_step, expected.unmask_step)


@pytest.mark.parametrize(
    "options",
    [
        dict(cache="none"),
        dict(history=True),
        dict(schedule="dream", steps_per_block=4, rule="quota_or_threshold", threshold=0.5),
        dict(rule="bernoulli", steps=4),
        dict(threshold=0.3, kl_threshold=0.1),
        dict(threshold=0.3, edit_threshold=0.5),
        dict(parity="dllm_bd3lm"),
        dict(eos_ids=tuple(range(17))),
    ],
)
def test_what_the_host_must_see_is_left_to_it(options):
    assert graph_loop_of(make_plan(tiny_model(), None, None, options)) is None


def test_a_callable_is_left_to_the_host():
    options = dict(mask_id=3, cache="none")
    assert graph_loop_of(make_plan(lambda ids: ids, None, None, options)) is None
