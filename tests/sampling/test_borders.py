"""Bad input, strange models, interruption: a clear error or a defined result, nothing left behind."""

import pytest
import torch

import dllm_kernels as dk
from tests.sampling.tiny_models import EOS, MASK, PAD, VOCABULARY, prompts_of, tiny_model


@pytest.fixture
def caches(monkeypatch):
    """The caches that calls make, so that tests see what is left in them."""
    made = []

    class Recorded(dk.BlockKVCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("dllm_kernels.sampling.plan.BlockKVCache", Recorded)
    return made


OPTIONS = {
    "threshold and factor": (dict(threshold=0.9, factor=1.0), "factor=1.0 contradicts threshold"),
    "rule without its number": (dict(rule="threshold"), "needs threshold"),
    "both kinds of steps": (dict(steps=4, steps_per_block=2), "give one"),
    "strict quota": (dict(strict=True), "strict=True has no meaning with quota"),
    "no tokens": (dict(max_new_tokens=0), "max_new_tokens must lie in 1"),
    "negative temperature": (dict(temperature=-1.0), "temperature"),
    "unknown schedule": (dict(schedule="best"), "schedule is 'best'; allowed: llada"),
    "mask beyond the vocabulary": (dict(mask_id=VOCABULARY), "mask_id holds 120; the vocabulary is 0..119"),
    "end token beyond it": (dict(eos_ids=(500,)), "eos_ids holds 500"),
    "mask that ends": (dict(eos_ids=(MASK,)), "is an end token too"),
    "fewer steps than blocks": (dict(max_new_tokens=32, steps=3), "steps is 3, but row 0 has 5 blocks"),
    "more than its positions": (dict(max_new_tokens=1000), "needs 1008 positions"),
    "approximate cache, block-causal": (dict(cache="dual"), 'this model is block-causal.*"block" is exact'),
    "window, block-causal": (dict(suffix_window=8), "suffix_window has no meaning"),
    "window behind nothing": (dict(cache="block", suffix_window=8), "suffix_window has no meaning"),
    "nothing to renew": (dict(refresh_every=2), 'refresh_every renews cache="prefix" or "dual"'),
    "tokens kept from nothing": (dict(cfg_keep_tokens=(1,)), "without cfg_scale"),
    "drawn quotas of no schedule": (dict(stochastic=True), 'draws the quotas of schedule="dllm"'),
    "drawn quotas of a threshold": (dict(stochastic=True, schedule="dllm", threshold=0.5), "without them"),
    "positions drawn from no quota": (dict(threshold=0.5, alg_temp=0.1), "alg_temp=0.1 has no meaning"),
    "time without steps": (dict(rule="bernoulli"), "give steps or steps_per_block"),
    "noise level of nothing": (dict(eps=0.1), "eps=0.1 has no meaning"),
    "stability without a bound": (dict(rule="confident_stable", threshold=0.5), "needs kl_threshold"),
    "edits without a threshold": (dict(edit_threshold=0.5), "needs threshold"),
    "edits nobody makes": (dict(max_post_steps=3), "max_post_steps=3 has no meaning with quota"),
    "a threshold below every confidence": (dict(threshold=-0.5), "threshold is -0.5; .* >= 0"),
    "no threshold": (dict(threshold=float("nan")), "threshold is nan; it must be a finite number"),
    "a probability as a threshold of entropies": (
        dict(threshold=0.9, confidence="entropy"),
        "threshold of confidence='entropy' is 0.9; .* <= 0",
    ),
    "edits below every confidence": (dict(threshold=0.5, edit_threshold=-0.5), "edit_threshold is -0.5"),
    "a negative bound": (dict(entropy_bound=-1.0), "entropy_bound is -1.0; .* >= 0"),
    "a negative factor": (dict(factor=-1.0), "factor is -1.0; .* >= 0"),
    "a negative divergence": (dict(threshold=0.5, kl_threshold=-1.0), "kl_threshold is -1.0; .* >= 0"),
    "no stable step": (dict(threshold=0.5, kl_threshold=1.0, stable_steps=0), "stable_steps must lie in 1"),
    "suppressed token beyond": (dict(suppress_tokens=(120,)), "suppress_tokens holds 120"),
    "two rules": (dict(threshold=0.5, kl_threshold=0.1, factor=1.0), "factor=1.0 contradicts"),
    "no probability": (dict(top_p=1.5), "top_p is 1.5; it must be a finite number from 0 to 1"),
    "no tokens kept": (dict(top_k=0), "top_k must lie in 1"),
    "negative guidance": (dict(cfg_scale=-1.0), "cfg_scale is -1.0"),
    "kept token beyond": (dict(cfg_scale=1.0, cfg_keep_tokens=(120,)), "cfg_keep_tokens holds 120"),
    "unknown parity": (dict(parity="best"), "parity is 'best'; allowed: llada"),
    "parity with noise": (dict(parity="llada", temperature=1.0), "parity holds at temperature 0"),
    "parity with another cache": (dict(parity="llada", cache="dual"), "contradicts parity='llada'"),
}


def test_thresholds_at_the_ends_of_their_range():
    for options in (dict(threshold=0.0), dict(threshold=1.1), dict(threshold=-3.5, confidence="entropy")):
        assert dk.SampleConfig(**options).threshold == next(iter(options.values()))
    assert dk.SampleConfig(threshold=0.0, confidence="entropy", strict=True).threshold == 0.0


@pytest.mark.parametrize(("options", "reason"), OPTIONS.values(), ids=OPTIONS)
def test_options_that_cannot_be_meant(options, reason):
    with pytest.raises(ValueError, match=reason):
        dk.sample(tiny_model(), [[1, 2, 3]], **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(threshold="high"), "threshold is 'high'; it must be a number"),
        (dict(steps=2.5), "steps must be an integer"),
        (dict(treshold=0.9), "'treshold' is not an option"),
        (dict(config={"steps": 2}), "config is a dict"),
        (dict(rule=0.9), "rule is 0.9"),
        (dict(suppress_tokens="a"), "suppress_tokens is 'a'"),
    ],
)
def test_options_of_the_wrong_type(options, reason):
    with pytest.raises(TypeError, match=reason):
        dk.sample(tiny_model(), [[1, 2, 3]], **options)


PROMPTS = {
    "no prompts": ([], "prompts is"),
    "an empty prompt": ([[1], []], r"prompts\[1\] is empty"),
    "an empty tensor row": (torch.zeros(1, 0, dtype=torch.long), r"prompts\[0\] is empty"),
    "an id beyond the vocabulary": ([[1, 200]], "holds id 200; the vocabulary is 0..119"),
    "a negative id": ([[-1]], "holds id -1"),
    "a mask in the prompt": ([[1, MASK]], "dk.infill fills gaps"),
    "text without a tokenizer": ("def", "needs tokenizer="),
    "more than its positions": ([[1] * 250], "the model has 256"),
}


@pytest.mark.parametrize(("prompts", "reason"), PROMPTS.values(), ids=PROMPTS)
def test_prompts_that_cannot_be_completed(prompts, reason):
    with pytest.raises(ValueError, match=reason):
        dk.sample(tiny_model(), prompts)


@pytest.mark.parametrize("prompts", [7, [1, 2], [[1.5]], [["a"]], [[1], "a"], torch.ones(1, 2)])
def test_prompts_of_the_wrong_type(prompts):
    with pytest.raises((TypeError, ValueError), match="prompts"):
        dk.sample(tiny_model(), prompts)


def test_models_that_cannot_be_sampled():
    with pytest.raises(TypeError, match="model is a int"):
        dk.sample(3, [[1]])
    with pytest.raises(ValueError, match="needs a transformers model"):
        dk.sample(lambda ids: ids, [[1]], cache="block", mask_id=MASK)
    with pytest.raises(ValueError, match='cache="dual" needs a transformers model'):
        dk.sample(lambda ids: ids, [[1]], cache="dual", mask_id=MASK)
    with pytest.raises(ValueError, match="whose steps would differ"):
        prompts = [[1], [1] * 8]
        dk.sample(tiny_model(), prompts, rule="bernoulli", max_new_tokens=8, steps=8, block_size=8)
    with pytest.raises(ValueError, match="this model is bidirectional"):
        dk.sample(tiny_model(attention="bidirectional"), [[1]], cache="block")
    with pytest.raises(ValueError, match="mask_id is not known"):
        dk.sample(lambda ids: ids, [[1]])
    with pytest.raises(ValueError, match="must give logits"):
        dk.sample(lambda ids: ids, [[1]], mask_id=MASK)
    with pytest.raises(ValueError, match="not marked as a diffusion model"):
        dk.sample(tiny_model(diffusion=None), [[1]])


def test_a_threshold_ignores_steps():
    """Fast-dLLM's callers give both."""
    plain = dk.sample(tiny_model(), [[1, 2, 3]], threshold=0.4)
    both = dk.sample(tiny_model(), [[1, 2, 3]], threshold=0.4, steps=1)
    assert torch.equal(plain.sequences, both.sequences) and plain.forwards == both.forwards


def test_a_model_that_drops_the_view_is_refused(monkeypatch):
    """A layer that does not pass its keywords on would silently attend causally."""
    model = tiny_model("llama", "bidirectional")
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, dllm_view=None, **more: forward(*args, **more))
    with pytest.raises(ValueError, match="did not reach the attention of LlamaAttention"):
        dk.sample(model, [[1, 2]], max_new_tokens=4)


STRANGE = {
    "constant": lambda ids: torch.zeros(*ids.shape, VOCABULARY),
    "NaN": lambda ids: torch.full((*ids.shape, VOCABULARY), torch.nan),
    "all minus infinity": lambda ids: torch.full((*ids.shape, VOCABULARY), -torch.inf),
    "always the mask": lambda ids: torch.zeros(*ids.shape, VOCABULARY).index_fill(
        2, torch.tensor(MASK), 50.0
    ),
}
RULES = [
    dict(), dict(threshold=0.9), dict(factor=1.0), dict(entropy_bound=0.1), dict(temperature=1.0),
    dict(rule="bernoulli", steps_per_block=4), dict(threshold=0.9, kl_threshold=0.1),
    dict(threshold=0.9, edit_threshold=0.0, max_post_steps=1), dict(top_p=0.5, top_k=3), dict(cfg_scale=1.0),
    dict(shift=True), dict(alg_temp=1.0), dict(begin_suppress_tokens=tuple(range(118))),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("model", STRANGE.values(), ids=STRANGE)
def test_every_rule_finishes_on_strange_logits(model, rule):
    output = dk.sample(model, [[1], [2, 3]], max_new_tokens=9, block_size=4, mask_id=MASK, **rule)
    assert not (output.sequences == MASK).any()
    masks, blocks = 2 * 9, 2 * 3
    assert output.forwards <= masks + blocks


def test_a_vocabulary_that_is_suppressed_whole_ends_in_an_error():
    with pytest.raises(ValueError, match=r"suppress_tokens|vocabulary"):
        dk.sample(STRANGE["constant"], [[1]], mask_id=MASK, suppress_tokens=tuple(range(VOCABULARY)))


def test_constant_logits_give_the_lowest_allowed_id():
    output = dk.sample(STRANGE["NaN"], [[7]], max_new_tokens=3, mask_id=MASK, suppress_tokens=(0, 1))
    assert output.sequences.tolist() == [[7, 2, 2, 2]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("options", [dict(), dict(cache="dual"), dict(cfg_scale=1.0)], ids=str)
def test_interruption_leaves_nothing_behind(caches, error, options):
    model = tiny_model(attention="bidirectional" if "cache" in options else "block_causal")
    implementation = model.config._attn_implementation
    model.train()

    def stop(event):
        if event.forwards == 3:
            assert caches[0].pages_used > 0 and model.config._attn_implementation == "dllm"
            raise error

    with pytest.raises(error):
        dk.sample(model, prompts_of(3, 20), max_new_tokens=20, on_round=stop, **options)
    assert caches[0].pages_used == 0
    assert model.config._attn_implementation == implementation
    assert model.training and model.model.layers[0].training
    model.eval()


def test_pages_come_back_as_rows_finish(caches):
    free = []
    prompts = prompts_of(3, 60, 30)
    dk.sample(tiny_model(), prompts, max_new_tokens=20, stop_on_eos=False, max_batch=2, threshold=0.5,
              on_round=lambda event: free.append(caches[0].pages_free))  # fmt: skip
    assert caches[0].pages_used == 0
    assert len(set(free)) > 1, "rows of unequal length hold unequal numbers of pages"


def test_a_prefix_that_prompts_share_is_stored_once(caches):
    used = []
    (start,) = prompts_of(64)
    dk.sample(tiny_model(), [[*start, 1], [*start, 2], [*start, 3]], max_new_tokens=15, stop_on_eos=False,
              on_round=lambda event: used.append(caches[0].pages_used))  # fmt: skip
    assert max(used) == 3 + 2 * 1, "of 80 tokens each, 64 on two shared pages"
    assert caches[0].pages_used == 0


def test_rows_wait_for_a_slot_and_come_out_the_same():
    model, prompts = tiny_model(), prompts_of(3, 17, 9, 24, 1)
    together = dk.sample(model, prompts, max_new_tokens=12, threshold=0.4)
    waiting = dk.sample(model, prompts, max_new_tokens=12, threshold=0.4, max_batch=2)
    assert torch.equal(waiting.sequences, together.sequences)
    assert torch.equal(waiting.unmask_step, together.unmask_step)
    assert waiting.forwards > together.forwards


def test_padding_comes_from_the_attention_mask_not_from_ids():
    model = tiny_model(attention="bidirectional")
    rows = [[5, PAD, EOS, 9], [4, 4]]
    left = torch.tensor([[5, PAD, EOS, 9], [PAD, PAD, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    expected = dk.sample(model, rows, max_new_tokens=6)
    found = dk.sample(model, left, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_callable_never_sees_padding():
    seen = []

    def model(ids):
        seen.append(tuple(ids.shape))
        return torch.zeros(*ids.shape, VOCABULARY)

    dk.sample(model, [[1], [2, 3], [4]], max_new_tokens=2, steps=1, mask_id=MASK)
    assert sorted(seen) == [(1, 4), (2, 3)]


def always_five(head, arguments, logits):
    return logits.index_fill(-1, torch.tensor([5]), 1e4)


@pytest.mark.parametrize("way", ["hook", "forward of its own"])
def test_a_head_that_does_more_than_its_product_is_called(monkeypatch, way):
    head = tiny_model().lm_head
    if way == "hook":
        handle = head.register_forward_hook(always_five)
    else:
        plain = head.forward
        monkeypatch.setitem(head.__dict__, "forward", lambda x: always_five(head, x, plain(x)))
    try:
        output = dk.sample(tiny_model(), [[1, 2]], max_new_tokens=6)
    finally:
        if way == "hook":
            handle.remove()
    assert output.sequences.tolist() == [[1, 2, *[5] * 6]]
