"""The model of tiny-python, new or begun from an exported checkpoint."""

import re

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dllm_train.recipes.tiny_python.settings import Settings


def build_model(settings: Settings, tokenizer) -> Qwen3ForCausalLM:
    """Return a Qwen3 with tied embeddings; residual branches start at zero."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        intermediate_size=settings.mlp,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def start_from(model: Qwen3ForCausalLM, folder: str) -> None:
    """Load the weights of an exported checkpoint. A model with n times its layers computes what it does: of
    every layer it has a copy and n - 1 that add nothing yet. ValueError for another number of layers."""
    start = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers, given = model.config.num_hidden_layers, start.config.num_hidden_layers
    if layers % given:
        raise ValueError(f"layers is {layers}; it must be a multiple of the {given} layers of {folder}")
    copies, state = layers // given, {}
    for name, weight in start.state_dict().items():
        layer = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name)
        if layer is None:
            state[name] = weight
            continue
        for copy in range(copies):
            silent = copy > 0 and name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))
            number = int(layer[2]) * copies + copy
            state[f"{layer[1]}{number}{layer[3]}"] = torch.zeros_like(weight) if silent else weight
    model.load_state_dict(state)
