"""Tiny random diffusion models, made on the spot: vocabulary 120, mask 119, end token 118."""

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCABULARY, MASK, EOS, PAD = 120, 119, 118, 117


@functools.cache
def tiny_model(architecture: str = "qwen3", attention: str = "block_causal", block_size: int = 8, **more):
    """A random model in eval mode; weights are scaled up so that it is sure of some tokens."""
    config_class, model_class = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[architecture]
    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        mask_token_id=MASK,
        diffusion={"attention": [attention], "block_size": block_size},
    )
    torch.manual_seed(len(architecture))
    model = model_class(config_class(**{**options, **more})).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2.5)
    model.lm_head.weight.data.mul_(4)
    return model


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, PAD, (length,), generator=generator).tolist() for length in lengths]
