"""Stock transformers models give the same logits on our attention as on their own."""

import copy

import pytest
import torch
import transformers
from torch import nn

import dllm_kernels as dk

COMMON = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
GROUPED = dict(num_key_value_heads=2)
SLIDING = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
CAUSAL_MODELS = {
    "llama": transformers.LlamaConfig(**COMMON, **GROUPED),
    "qwen2": transformers.Qwen2Config(**COMMON, **GROUPED),
    "qwen2, sliding": transformers.Qwen2Config(**COMMON, **GROUPED, **SLIDING),
    "qwen3": transformers.Qwen3Config(**COMMON, **GROUPED, head_dim=16),
    "mistral": transformers.MistralConfig(**COMMON, **GROUPED, sliding_window=None),
    "mistral, sliding": transformers.MistralConfig(**COMMON, **GROUPED, sliding_window=4),
    "gpt2": transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True
    ),
}
MASKED_MODELS = {
    "bert": transformers.BertConfig(**COMMON),
    "roberta": transformers.RobertaConfig(**{**COMMON, "pad_token_id": 1}),
    "modernbert": transformers.ModernBertConfig(
        **{**COMMON, "num_hidden_layers": 4}, local_attention=6, cls_token_id=None, sep_token_id=None
    ),
}
MODELS = {
    **{name: (transformers.AutoModelForCausalLM, config) for name, config in CAUSAL_MODELS.items()},
    **{name: (transformers.AutoModelForMaskedLM, config) for name, config in MASKED_MODELS.items()},
}
IDS = torch.randint(2, 64, (2, 18), generator=torch.Generator().manual_seed(0))
REAL = torch.ones(2, 18, dtype=torch.long)


def padding(left: int, right: int) -> torch.Tensor:
    mask = REAL.clone()
    mask[1, :left] = 0
    mask[1, 18 - right :] = 0
    return mask


MASKS = {"none": None, "right": padding(0, 6), "left": padding(7, 0)}


def untrained(name):
    """Return a model of MODELS with a config of its own, which a test may change."""
    auto_class, config = MODELS[name]
    return auto_class.from_config(copy.deepcopy(config)).eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(1)
    return untrained(request.param)


@pytest.mark.parametrize("padded", MASKS)
def test_logits_are_those_of_the_models_own_attention(model, padded):
    mask = MASKS[padded]
    real = REAL.bool() if mask is None else mask.bool()
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
        with dk.enable_attention(model):
            found = model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=0)


def test_a_dllm_mask_replaces_the_models_own(model):
    """Block-causal spans equal the 4-D mask that says the same; sliding layers cut both to their window."""
    spans = dk.SpanMask.block_causal(18, 4)
    dense = spans.to_dense()[:, None]
    if (
        "sliding_attention" in getattr(model.config, "layer_types", ())
        or model.config.model_type == "mistral"
    ):
        distance = (torch.arange(18)[:, None] - torch.arange(18)).abs()
        window = model.config.sliding_window
        if window is not None:
            window += model.config.model_type == "modernbert"
            near = dense & (distance < window)
            dense = {"full_attention": dense, "sliding_attention": near}
            if model.config.model_type == "mistral":
                dense = near
    with torch.no_grad():
        expected = model(IDS, attention_mask=dense).logits
        with dk.enable_attention(model):
            found = model(IDS, dllm_mask=spans).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# ---- one model is enough for the rest ----------------------------------------------------------------
@pytest.fixture
def llama():
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(copy.deepcopy(CAUSAL_MODELS["llama"])).eval()


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **inputs).logits


def test_the_old_attention_comes_back(llama):
    llama.set_attn_implementation("eager")
    with pytest.raises(KeyboardInterrupt), dk.enable_attention(llama):
        assert llama.config._attn_implementation == "dllm"
        raise KeyboardInterrupt
    assert llama.config._attn_implementation == "eager"
    assert llama.model.config._attn_implementation == "eager"


def test_masks_given_whole(llama):
    """2-D masks with holes, and 4-D masks, boolean or additive, mean what they mean to sdpa."""
    holes = REAL.clone()
    holes[:, 5:7] = 0
    seen = dk.SpanMask.block_causal(18, 4).to_dense()[:, None].expand(2, -1, -1, -1)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (holes, seen, added):
        expected = logits(llama, attention_mask=mask)
        with dk.enable_attention(llama):
            found = logits(llama, attention_mask=mask)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_mask_changed_in_place_counts_anew(llama):
    mask = torch.ones(1, 1, 18, 18, dtype=torch.bool)
    with dk.enable_attention(llama):
        before = logits(llama, attention_mask=mask)
        mask.tril_()
        after = logits(llama, attention_mask=mask)
        causal = logits(llama)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, causal, atol=1e-4, rtol=0)


def test_packed_documents_told_by_position_ids(llama):
    positions = torch.cat([torch.arange(11), torch.arange(7)])[None].expand(2, -1)
    expected = logits(llama, position_ids=positions)
    with dk.enable_attention(llama):
        torch.testing.assert_close(logits(llama, position_ids=positions), expected, atol=1e-4, rtol=0)


def test_generate_with_a_cache(llama):
    options = dict(attention_mask=MASKS["left"], max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = llama.generate(IDS, **options)
    with dk.enable_attention(llama):
        assert torch.equal(llama.generate(IDS, **options), expected)


def test_gradients_are_those_of_sdpa(llama):
    def gradient():
        llama.zero_grad()
        llama(
            IDS, attention_mask=MASKS["right"], labels=IDS.masked_fill(MASKS["right"] == 0, -100)
        ).loss.backward()
        return {name: weight.grad.clone() for name, weight in llama.named_parameters()}

    expected = gradient()
    with dk.enable_attention(llama):
        found = gradient()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.rand(2, 1, 18, 18), "bias"),
        (torch.ones(2, 4, 18, 18, dtype=torch.bool), "per head"),
    ],
)
def test_masks_that_are_no_spans_are_refused(llama, mask, reason):
    with dk.enable_attention(llama), pytest.raises(ValueError, match=reason):
        logits(llama, attention_mask=mask)


def test_dropout_in_training_is_refused_with_the_remedy():
    config = transformers.LlamaConfig(**COMMON, attention_dropout=0.1)
    model = transformers.LlamaForCausalLM(config).train()
    with dk.enable_attention(model), pytest.raises(ValueError, match="load the model with attention_dropout"):
        model(IDS)
    with dk.enable_attention(model.eval()):
        model(IDS)


class OwnAttention(nn.Module):
    """Does not go through transformers' interface."""


class OwnModel(transformers.PreTrainedModel):
    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.attention = OwnAttention()


def test_what_cannot_be_hooked_says_so():
    own = OwnModel(transformers.LlamaConfig(**COMMON))
    with (
        pytest.raises(ValueError, match=r'cannot be hooked.*cache="none"'),
        dk.enable_attention(own),
    ):
        pass
    with pytest.raises(TypeError, match=r'Linear.*cache="none"'), dk.enable_attention(nn.Linear(2, 2)):
        pass


def test_windows_follow_the_positions_of_each_call():
    """A mask that is used again with other position_ids is cut anew."""
    torch.manual_seed(1)
    model = transformers.MistralForCausalLM(CAUSAL_MODELS["mistral, sliding"]).eval()
    spans, twice = dk.SpanMask.block_diffusion(9, 3), torch.arange(9).repeat(2)[None]
    for positions in (torch.arange(18)[None], twice):
        near = (positions[:, :, None] - positions[:, None]).abs() < model.config.sliding_window
        expected = logits(model, attention_mask=(near & spans.to_dense())[:, None], position_ids=positions)
        with dk.enable_attention(model):
            found = logits(model, dllm_mask=spans, position_ids=positions)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
