"""Tokens of dk.sample and dk.infill equal the plain loop of sampling/plain_loop.py, in float32."""

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.sampling import plain_loop
from tests.sampling.tiny_models import EOS, MASK, prompts_of, tiny_model

RULES = {
    "one token a step": dict(),
    "steps in all": dict(steps=17),
    "more steps than masks": dict(steps_per_block=20),
    "threshold": dict(threshold=0.3),
    "strict threshold on the margin": dict(threshold=0.2, strict=True, confidence="margin"),
    "factor": dict(factor=1.2),
    "entropy": dict(steps_per_block=4, confidence="entropy"),
    "random": dict(steps_per_block=4, confidence="random", seed=3),
    "noise": dict(threshold=0.3, temperature=0.8, seed=5),
    "noise and a quota": dict(steps_per_block=3, temperature=1.3, seed=2**40 + 1),
    "suppressed tokens": dict(threshold=0.3, suppress_tokens=tuple(range(0, 110, 2))),
    "quota or threshold": dict(rule="quota_or_threshold", threshold=0.5, steps_per_block=3),
    "entropy bound": dict(entropy_bound=1.0),
    "dllm schedule": dict(steps_per_block=5, schedule="dllm"),
    "dllm's cosine schedule": dict(steps_per_block=5, schedule="dllm_cosine"),
    "dream schedule": dict(steps_per_block=3, schedule="dream", eps=0.01),
    "drawn quotas": dict(steps_per_block=5, schedule="dllm", stochastic=True, seed=3),
    "drawn positions": dict(steps_per_block=3, alg_temp=0.5, seed=2),
    "drawn by time": dict(rule="bernoulli", steps_per_block=9, seed=1),
    "drawn by time, few masks": dict(rule="bernoulli", steps_per_block=30, eps=0.1),
    "top-p": dict(threshold=0.3, top_p=0.6),
    "top-p and noise": dict(steps_per_block=4, top_p=0.9, temperature=0.7, confidence="entropy"),
    "top-k": dict(steps_per_block=4, top_k=3, confidence="margin"),
    "top-p of what is unlikely to begin with": dict(
        threshold=0.4, top_p=0.4, begin_suppress_tokens=tuple(range(60))
    ),
    "unlikely to begin with": dict(threshold=0.2, begin_suppress_tokens=tuple(range(0, 100))),
    "confident and stable": dict(threshold=0.2, kl_threshold=0.5),
    "stable at the temperature of a filter": dict(threshold=0.2, kl_threshold=0.5, top_k=9, temperature=0.5),
    "stable for long": dict(threshold=0.0, kl_threshold=2.0, stable_steps=3),
    "edit": dict(threshold=0.3, edit_threshold=0.3),
    "edit, few steps": dict(threshold=0.4, edit_threshold=0.0, max_post_steps=2),
    "no edits after the last mask": dict(threshold=0.4, edit_threshold=0.0, max_post_steps=0),
    "guidance": dict(threshold=0.4, cfg_scale=0.7),
    "guidance that keeps tokens": dict(steps_per_block=5, cfg_scale=2.0, cfg_keep_tokens=tuple(range(60))),
    "shift": dict(threshold=0.3, shift=True),
    "shift and guidance": dict(steps_per_block=5, shift=True, cfg_scale=0.5),
}
CASES = [
    ("bidirectional", "none"), ("bidirectional", "prefix"), ("bidirectional", "dual"),
    ("block_causal", "none"), ("block_causal", "block"),
]  # fmt: skip


def assert_rows_equal(output, rows: list[plain_loop.ReferenceRow], record_property) -> None:
    """Tokens and the steps that wrote them are equal; only a row with a near-tie may differ."""
    differing = []
    for index, row in enumerate(rows):
        length = len(row.ids)
        same = (
            output.sequences[index, :length].tolist() == row.ids
            and output.unmask_step[index, :length].tolist() == row.unmask_step
        )
        if not same:
            differing.append(index)
    ties = [index for index, row in enumerate(rows) if row.near_ties]
    record_property("rows decided by rounding", differing)
    assert set(differing) <= set(ties), f"rows {differing} differ, near-ties only in {ties}"


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("attention", "cache"), CASES[::4])
def test_every_rule(attention, cache, options, record_property):
    model, prompts = tiny_model(attention=attention), prompts_of(3, 9)
    config = dk.SampleConfig(max_new_tokens=11, block_size=8, cache=cache, **options)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    assert_rows_equal(dk.sample(model, prompts, config=config), rows, record_property)


@pytest.mark.parametrize("block_size", [4, 5, 32])
@pytest.mark.parametrize(("attention", "cache"), CASES)
def test_unequal_prompts_and_every_block_size(attention, cache, block_size, record_property):
    """Llama with one kv head; prompts around block borders."""
    model = tiny_model("llama", attention, num_key_value_heads=1, head_dim=8)
    prompts = prompts_of(1, 40, 33, 4, seed=1)
    config = dk.SampleConfig(max_new_tokens=13, block_size=block_size, cache=cache, threshold=0.4)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    assert_rows_equal(dk.sample(model, prompts, config=config), rows, record_property)


@pytest.mark.parametrize(("attention", "cache"), CASES)
def test_rows_that_end_early(attention, cache, record_property):
    """With 15 end tokens most rows end early, at different steps."""
    model, prompts = tiny_model(attention=attention), prompts_of(5, 9, 2, 30, 14, seed=2)
    eos_ids = (EOS, *range(20, 34))
    config = dk.SampleConfig(max_new_tokens=24, block_size=8, cache=cache, threshold=0.5, eos_ids=eos_ids)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    output = dk.sample(model, prompts, config=config)
    assert_rows_equal(output, rows, record_property)
    assert all(ours <= row.forwards for ours, row in zip(output.row_forwards.tolist(), rows, strict=True))
    assert len(output.lengths.unique()) > 2 and output.lengths.min() < 24


@pytest.mark.parametrize("options", [dict(steps=9), dict(threshold=0.4)])
@pytest.mark.parametrize(("attention", "cache"), CASES)
def test_infilling(attention, cache, options, record_property):
    model, canvases = tiny_model(attention=attention), prompts_of(40, 21, 64, seed=3)
    for canvas, gaps in zip(canvases, [[(2, 5), (18, 21), (39, 40)], [(0, 21)], [(33, 50)]], strict=True):
        for start, end in gaps:
            canvas[start:end] = [MASK] * (end - start)
    config = dk.SampleConfig(block_size=8, cache=cache, **options)
    rows = [plain_loop.infill_row(model, c, config, sequence=i) for i, c in enumerate(canvases)]
    assert_rows_equal(dk.infill(model, canvases, config=config), rows, record_property)


APPROXIMATIONS = {
    "renewed every other step": dict(cache="dual", refresh_every=2),
    "renewed every third step": dict(cache="prefix", refresh_every=3),
    "nothing far behind the block": dict(cache="none", suffix_window=4),
    "a narrow dual window": dict(cache="dual", suffix_window=3),
    "a narrow prefix window": dict(cache="prefix", suffix_window=9, refresh_every=2),
    "nothing behind the block": dict(cache="prefix", suffix_window=0),
}


@pytest.mark.parametrize("options", APPROXIMATIONS.values(), ids=APPROXIMATIONS)
def test_approximate_caches(options, record_property):
    """Rows of unequal length at different steps: a refresh of one stands beside steps of others."""
    model = tiny_model(attention="bidirectional")
    prompts = prompts_of(1, 40, 12, seed=6)
    config = dk.SampleConfig(max_new_tokens=29, block_size=8, threshold=0.4, **options)
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    output = dk.sample(model, prompts, config=config)
    assert_rows_equal(output, rows, record_property)
    assert not output.exact
    alone = dk.sample(model, prompts, config=config, max_batch=1)
    assert torch.equal(alone.sequences, output.sequences)


@pytest.mark.parametrize("guided", [dict(), dict(cfg_scale=0.8)], ids=["plain", "guided"])
@pytest.mark.parametrize(("attention", "cache"), CASES)
def test_shift_with_every_cache(attention, cache, guided, record_property):
    """The first position of a block is predicted by an output that later steps do not compute."""
    model, prompts = tiny_model(attention=attention), prompts_of(1, 16, 9, seed=7)
    config = dk.SampleConfig(
        max_new_tokens=21, block_size=8, steps_per_block=5, cache=cache, shift=True, **guided
    )
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    assert_rows_equal(dk.sample(model, prompts, config=config), rows, record_property)


@pytest.mark.parametrize(
    "options",
    [
        dict(threshold=0.2, kl_threshold=0.5),
        dict(rule="bernoulli", steps_per_block=6),
        dict(threshold=0.3, edit_threshold=0.3, max_post_steps=3),
        dict(cfg_scale=0.5, threshold=0.4, shift=True),
        dict(cache="dual", threshold=0.4),
    ],
    ids=str,
)
def test_rows_that_take_turns(options, record_property):
    """Rows come and go in two slots, and each is as alone."""
    model = tiny_model(attention="bidirectional" if "cache" in options else "block_causal")
    prompts = prompts_of(3, 17, 8, 1, 30, seed=11)
    config = dk.SampleConfig(
        max_new_tokens=20, block_size=8, max_batch=2, eos_ids=(EOS, 20, 21, 22), **options
    )
    rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
    assert_rows_equal(dk.sample(model, prompts, config=config), rows, record_property)


def test_a_cache_renewed_every_step_is_exact():
    model, prompts = tiny_model(attention="bidirectional"), prompts_of(7, 30, seed=8)
    options = dict(max_new_tokens=20, block_size=8, threshold=0.4)
    exact, renewed = (
        dk.sample(model, prompts, **options, **more) for more in (dict(), dict(cache="dual", refresh_every=1))
    )
    assert torch.equal(exact.sequences, renewed.sequences) and exact.exact and renewed.exact


def test_prompts_that_begin_alike_share_their_pages():
    """The second row waits a round for the first one's pages; tokens are those of each alone."""
    model, (start,) = tiny_model(), prompts_of(67, seed=9)
    prompts = [[*start, 1, 2], [*start, 3], [*start[:40], 5]]
    options = dict(max_new_tokens=14, threshold=0.4)
    for more in (dict(), dict(shift=True), dict(cfg_scale=0.5)):
        together = dk.sample(model, prompts, **options, **more)
        for row, prompt in enumerate(prompts):
            length = len(prompt) + 14
            alone = dk.sample(model, [prompt], **options, **more).sequences[0, :length]
            assert together.sequences[row, :length].tolist() == alone.tolist()


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
def test_sliding_window_layers(attention):
    """Layers with a window see only the near part of every span: as a function of ids, and cached."""
    model = tiny_model(
        attention=attention,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    )
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    prompts, options = prompts_of(21, 6, seed=4), dict(max_new_tokens=17, block_size=8, threshold=0.4)
    ours = dk.sample(model, prompts, **options)
    if attention == "block_causal":
        uncached = dk.sample(model, prompts, cache="none", **options)
        assert torch.equal(ours.sequences, uncached.sequences)
        return
    plain = dk.sample(_with_dense_windows(model), prompts, mask_id=MASK, eos_ids=EOS, **options)
    assert torch.equal(ours.sequences, plain.sequences)


def _with_dense_windows(model):
    """The model as a function of ids, with a dense mask for each kind of layer."""

    def logits(ids):
        position = torch.arange(ids.shape[1])
        near = (position[:, None] - position).abs() < model.config.sliding_window
        full = torch.ones_like(near)
        return model(
            ids, attention_mask={"full_attention": full[None, None], "sliding_attention": near[None, None]}
        )

    return logits
