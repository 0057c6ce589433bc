"""Random models of LLaDA's architecture, whose tokens depend on every part of it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import loops

END_ID = 1
# Standard deviation of projected features: at the usual one attention is all but uniform, and a model with
# wrong positions would predict the same tokens.
FEATURE_SCALE = 2.4


def random_model(layers: int, hidden: int, vocabulary: int) -> LlamaForCausalLM:
    """Return a bidirectional model with heads of 64, float32; the mask token is the last one."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        initializer_range=FEATURE_SCALE * hidden**-0.5,
        use_cache=False,  # LLaDA's own model refuses any other value
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=0,
        mask_token_id=vocabulary - 1,
        diffusion={"attention": ["bidirectional"]},
    )
    torch.manual_seed(0)
    return loops.see_both_ways(LlamaForCausalLM(config).eval())


def parameters(model) -> str:
    """Say how many there are: "60M"."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.3g}M"
