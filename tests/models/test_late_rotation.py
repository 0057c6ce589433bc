"""Fused layers leave the rotation of queries and keys to the operator that attends to the cache."""

import functools

import pytest
import torch
import transformers

import dllm_kernels as dk
from dllm_kernels.models import fused_layers
from dllm_kernels.models.attention import enable_attention
from dllm_kernels.models.late_rotation import late_rotation, leave_rotation, take_rotation
from dllm_kernels.sampling import views
from tests.sampling.tiny_models import EOS, MASK, PAD, VOCABULARY, prompts_of, tiny_model

# Llama is also what LLaDA's checkpoints run as, Qwen2 what Dream's do.
HANDING_ON = ["Llama", "Mistral", "Qwen2", "Qwen3"]
CACHES = {"block": "block_causal", "prefix": "bidirectional", "dual": "bidirectional"}


@functools.cache
def fused_model(name: str, attention: str, dtype=torch.float32, **options):
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, mask_token_id=MASK,
        diffusion={"attention": [attention], "block_size": 8},
    )  # fmt: skip
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2.5)
    assert dk.fuse_layers(model) > 4
    return model.to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of attend_and_write_ rotated, and whether it wrote."""
    seen, attend = [], views.attend_and_write_

    def watched(*arguments, **options):
        seen.append((options["cos"] is not None, options["positions"] is not None))
        return attend(*arguments, **options)

    monkeypatch.setattr(views, "attend_and_write_", watched)
    return seen


def sampled(model, cache, **options):
    options = dict(max_new_tokens=19, block_size=8, threshold=0.4, max_batch=2, logprobs=1) | options
    return dk.sample(model, prompts_of(3, 17, 9), cache=cache, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", HANDING_ON)
def test_samples_have_the_same_bits(name, cache, dtype, calls, monkeypatch):
    model = fused_model(name, CACHES[cache], dtype)
    late = sampled(model, cache)
    assert calls and all(rotates for rotates, _ in calls)
    calls.clear()
    monkeypatch.setattr(fused_layers, "leave_rotation", lambda *_: False)
    early = sampled(model, cache)
    assert not any(rotates for rotates, _ in calls)
    assert torch.equal(late.sequences, early.sequences)
    assert torch.equal(late.logprobs, early.logprobs)


def test_sliding_windows(calls, monkeypatch):
    sliding = dict(sliding_window=11, use_sliding_window=True, max_window_layers=1)
    model = fused_model("Qwen2", "bidirectional", **sliding)
    late = sampled(model, "dual")
    assert any(rotates for rotates, _ in calls)
    monkeypatch.setattr(fused_layers, "leave_rotation", lambda *_: False)
    assert torch.equal(late.logprobs, sampled(model, "dual").logprobs)


def test_block_causal_steps_write_in_the_same_call(calls):
    sampled(fused_model("Llama", "block_causal"), "block")
    assert (True, True) in calls


def test_layers_that_are_not_fused_rotate_themselves(calls):
    sampled(tiny_model("llama"), "block")
    assert calls and not any(rotates for rotates, _ in calls)


def test_forwards_that_do_more_with_what_they_rotated_rotate_it_themselves():
    class Scaled(transformers.models.llama.modeling_llama.LlamaAttention):
        def forward(self, x, position_embeddings, **_):
            query, key = apply_rotary_pos_emb(x, x, *position_embeddings)  # noqa: F821
            return 2 * query, key

    stock = transformers.models.llama.modeling_llama.LlamaAttention
    assert fused_layers._hands_on(stock.forward) and not fused_layers._hands_on(Scaled.forward)


def test_outside_of_sampling_nothing_is_left():
    model = fused_model("Qwen3", "bidirectional")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), enable_attention(model):
        expected = model(ids, use_cache=False).logits
        with late_rotation():  # no view: the attention function rotates
            assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert not leave_rotation(*torch.randn(4, 1, 2, 3, 8))


def test_under_autocast_nothing_is_left():
    with late_rotation(), torch.autocast("cpu", torch.bfloat16):
        assert not leave_rotation(*torch.randn(4, 1, 2, 3, 8))


def test_a_rotation_that_gets_lost_is_an_error():
    query, key, cos, sin = torch.randn(4, 1, 2, 3, 8)
    with late_rotation():
        assert leave_rotation(query, key, cos, sin)
        assert take_rotation(query, key) == (cos, sin) and take_rotation(query, key) is None
        assert leave_rotation(query, key, cos, sin)
        with pytest.raises(RuntimeError, match="was not called with the queries and keys"):
            take_rotation(2 * query, key)
        assert leave_rotation(query, key, cos, sin)
        with pytest.raises(RuntimeError, match="was not called with the queries and keys"):
            leave_rotation(query, key, cos, sin)
    assert take_rotation(query, key) is None
