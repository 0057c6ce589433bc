"""Rotary embeddings that depend on the length of a row: every step rotates as for its whole canvas."""

import threading

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.sampling import plain_loop
from tests.sampling.test_oracle import assert_rows_equal
from tests.sampling.tiny_models import prompts_of, tiny_model

LONG = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
KINDS = {
    "longrope": dict(rope_parameters=LONG),
    "dynamic": dict(rope_parameters=DYNAMIC, max_position_embeddings=48),
}
CASES = [
    ("bidirectional", dict(cache="none")),
    ("bidirectional", dict(cache="dual")),
    ("block_causal", dict(cache="none")),
    ("block_causal", dict(cache="block")),
]
LENGTHS = 8, 57, 30, 50, 4  # with 24 more, on both sides of 64 positions, and of 48


def made(kind, attention):
    return tiny_model.__wrapped__("llama", attention, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("attention", "options"), CASES, ids=str)
def test_rows_are_those_of_a_new_model_each(kind, attention, options, record_property):
    """The plain loop runs whole canvases through a model that has not seen another row."""
    model, prompts = made(kind, attention), prompts_of(*LENGTHS, seed=6)
    config = dk.SampleConfig(max_new_tokens=24, block_size=8, threshold=0.4, stop_on_eos=False, **options)
    rows = [
        plain_loop.sample_row(made(kind, attention), prompt, config, sequence=i)
        for i, prompt in enumerate(prompts)
    ]
    output = dk.sample(model, prompts, config=config)
    if options["cache"] == "dual":  # the plain loop's steps over a block would switch frequencies there
        alone = [dk.sample(model, [prompt], config=config).sequences[0] for prompt in prompts]
        assert all(
            torch.equal(row, both[: len(row)]) for row, both in zip(alone, output.sequences, strict=True)
        )
    else:
        assert_rows_equal(output, rows, record_property)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_rotates_afterwards_as_it_did(kind):
    model = made(kind, "bidirectional")
    before = {name: value.clone() for name, value in model.named_buffers()}
    rotary = model.model.rotary_emb
    dk.sample(model, prompts_of(50), max_new_tokens=24, threshold=0.0)
    assert model.model.rotary_emb is rotary and rotary.rope_type == kind
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_threads_with_rows_of_both_lengths():
    model, options = made("longrope", "block_causal"), dict(max_new_tokens=24, threshold=0.4)
    prompts = prompts_of(8, 57)
    expected = [dk.sample(model, [prompt], **options).sequences for prompt in prompts]
    found = [None, None]

    def work(index):
        found[index] = [dk.sample(model, [prompts[index]], **options).sequences for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, tokens in zip(found, expected, strict=True):
        assert all(torch.equal(output, tokens) for output in outputs)


def test_layers_of_two_kinds():
    """Where full and sliding layers rotate by themselves, and one kind depends on length."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16, max_position_embeddings=256, eos_token_id=118,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": LONG, "sliding_attention": dict(rope_type="default", rope_theta=10000.0)
        },
        mask_token_id=119, diffusion={"attention": ["block_causal"], "block_size": 8},
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2.5 if parameter.dim() > 1 else 1)
    options, prompts = dict(max_new_tokens=24, threshold=0.2), prompts_of(50, 8)
    none, block = (dk.sample(model, prompts, cache=cache, **options).sequences for cache in ("none", "block"))
    assert torch.equal(none, block)
    assert torch.equal(dk.sample(model, prompts[1:], **options).sequences[0], block[1, :32])


LIMITS = {
    "yarn": (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), 256),
    "linear": (dict(rope_type="linear", factor=2.0), 128),
    "none": (dict(rope_type="default"), 64),
}


@pytest.mark.parametrize(("rope", "limit"), LIMITS.values(), ids=LIMITS)
def test_positions_that_scaling_adds(rope, limit):
    rope = dict(rope, rope_theta=10000.0)
    model = tiny_model.__wrapped__("llama", "bidirectional", max_position_embeddings=64, rope_parameters=rope)
    options = dict(max_new_tokens=8, threshold=0.0, block_size=8)
    assert dk.sample(model, prompts_of(limit - 8), **options).sequences.shape == (1, limit)
    with pytest.raises(ValueError, match=f"the model has {limit}, by max_position_embeddings, the scaling"):
        dk.sample(model, prompts_of(limit - 7), **options)


def test_dynamic_scaling_has_no_limit():
    model = made("dynamic", "bidirectional")
    assert dk.sample(model, prompts_of(300), max_new_tokens=8, threshold=0.0).sequences.shape == (1, 308)
