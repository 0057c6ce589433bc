"""Every causal LM of transformers samples as a plain loop over its own logits does, or is refused by name.

The slow sweep (`-m slow`) takes every type that transformers lists.
"""

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import dllm_kernels as dk
from tests.models.tiny_types import MASK, NotTiny, tiny_model

SOME = ["llama4_text", "gemma3_text", "qwen3_moe", "falcon_h1", "lfm2", "qwen3_next", "opt", "bloom", "rwkv"]
ROWS = [5, 6, 7], [8, 9, 10, 11, 12, 13]
OPTIONS = dict(max_new_tokens=8, block_size=4, steps=6, stop_on_eos=False)


def plain(model):
    """The model as a function of whole canvases, of one row, on its own attention without a causal mask."""

    def logits(ids):
        seen = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        return model(ids, attention_mask=seen, use_cache=False).logits

    return logits


def without_causal_masks(model):
    """As `plain`, for layers that do not take such a mask."""

    def logits(ids):
        before = model.config.get_text_config().is_causal = False
        flags = [module for module in model.modules() if getattr(module, "is_causal", None) is True]
        for module in flags:
            module.is_causal = before
        try:
            return model(ids, use_cache=False).logits
        finally:
            del model.config.get_text_config().is_causal
            for module in flags:
                module.is_causal = True

    return logits


def check(name: str) -> None:
    try:
        model = tiny_model(name)
    except NotTiny as reason:
        pytest.skip(f"{name}: {reason}")
    model.config.diffusion = {"attention": ["bidirectional"], "block_size": 4}
    try:
        output = dk.sample(model, [*ROWS], **OPTIONS)
    except (TypeError, ValueError) as error:
        assert type(model).__name__ in str(error), error
        return
    assert output.exact
    for index, row in enumerate(ROWS):
        length = len(row) + OPTIONS["max_new_tokens"]
        tokens = output.sequences[index, :length]
        assert torch.equal(dk.sample(model, [row], **OPTIONS).sequences[0], tokens), "alone"
        assert torch.equal(plain_tokens(model, row), tokens), "plain"
    model.config.diffusion = {"attention": ["block_causal"], "block_size": 4}
    best, none = (dk.sample(model, [*ROWS], cache=cache, **OPTIONS).sequences for cache in ("auto", "none"))
    assert torch.equal(best, none)


def plain_tokens(model, row: list[int]) -> torch.Tensor:
    options = OPTIONS | dict(mask_id=MASK, cache="none")
    try:
        return dk.sample(plain(model), [row], **options).sequences[0]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return dk.sample(without_causal_masks(model), [row], **options).sequences[0]


SIZES = dict(
    vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, eos_token_id=2, pad_token_id=0, bos_token_id=1,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
    patch_size=14,
)  # fmt: skip


def multimodal(name: str):
    if name == "gemma3":
        config = transformers.Gemma3Config(text_config=SIZES, vision_config=VISION)
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        text, vision = dict(SIZES, model_type="llama"), dict(VISION, model_type="clip_vision_model")
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=100)
        model = transformers.LlavaForConditionalGeneration(config)
    model.config.mask_token_id = MASK
    model.config.diffusion = {"attention": ["bidirectional"], "block_size": 4}
    return model.eval()


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_the_language_part_of_a_multimodal_model(name):
    """Its sizes and special tokens are in a config of their own."""
    model = multimodal(name)
    for row, tokens in zip(ROWS, dk.sample(model, [*ROWS], **OPTIONS).sequences, strict=True):
        assert torch.equal(plain_tokens(model, row), tokens[: len(row) + 8])


def test_encoder_decoder_models_are_refused():
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    config = transformers.BartConfig(vocab_size=120, d_model=64, **sizes)
    model = transformers.BartForConditionalGeneration(config)
    model.config.mask_token_id, model.config.diffusion = MASK, {"attention": ["bidirectional"]}
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder model"):
        dk.sample(model, [[5]])


REASONS = {
    "opt": "OPTForCausalLM are more than .*: its forward does not call its base model, a OPTModel",
    "gemma2": "Gemma2ForCausalLM are more than .*: they are scaled or capped",
    "camembert": "CamembertForCausalLM are more than .*: its hidden states are transformed before",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_why_a_head_is_refused(name):
    with pytest.raises(ValueError, match=REASONS[name]):
        dk.sample(tiny_model(name), [[5]], max_new_tokens=4)


@pytest.mark.parametrize("name", SOME)
def test_some_types(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_type(name):
    check(name)
