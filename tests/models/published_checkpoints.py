"""Tiny random checkpoints as the families publish them: config.json and weight names written out by hand."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY, MASK, EOS, PAD = 120, 119, 118, 117
WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 2, 4, 2, 16
SPECIAL = dict(bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD)

_QWEN = dict(
    **SPECIAL, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, hidden_act="silu", attention_dropout=0.0,
    initializer_range=0.02, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=50000.0,
    rope_scaling=None, tie_word_embeddings=False, use_cache=False, torch_dtype="float32",
)  # fmt: skip
_WINDOW = dict(use_sliding_window=False, sliding_window=None, max_window_layers=LAYERS)
_LLADA = dict(
    eos_token_id=EOS, pad_token_id=PAD, mask_token_id=MASK, vocab_size=VOCABULARY, embedding_size=VOCABULARY,
    d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=HEADS, mlp_hidden_size=INNER, mlp_ratio=4,
    max_sequence_length=64, block_type="llama", block_group_size=1, activation_type="silu", rope=True,
    rope_theta=50000.0, rope_full_precision=True, alibi=False, alibi_bias_max=8.0, layer_norm_type="rms",
    layer_norm_with_affine=True, rms_norm_eps=1e-5, bias_for_layer_norm=False, attention_layer_norm=False,
    attention_layer_norm_with_affine=True, input_emb_norm=False, include_bias=False, include_qkv_bias=False,
    multi_query_attention=None, scale_logits=False, weight_tying=False, attention_dropout=0.0,
    embedding_dropout=0.0, residual_dropout=0.0, flash_attention=False, init_cutoff_factor=None,
    init_device="meta", init_fn="mitchell", init_std=0.02, precision="amp_bf16", torch_dtype="float32",
    use_cache=False,
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A family's checkpoint. weights: names -> shapes."""

    config: dict
    weights: dict[str, tuple[int, ...]]

    def write(self, folder: Path, dtype=torch.float32, **changes) -> Path:
        """Write the same random weights each time, scaled so that the model is sure of some tokens."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**self.config, **changes}))
        save_file(self.tensors(dtype), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def tensors(self, dtype=torch.float32) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        random = {name: torch.randn(shape, generator=generator) for name, shape in self.weights.items()}
        return {
            name: (0.3 * tensor if tensor.dim() > 1 else 1 + 0.1 * tensor).to(dtype)
            for name, tensor in random.items()
        }


def _llama_weights(head_dim: int, bias: bool = False, head_norms: bool = False) -> dict:
    weights = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    weights["lm_head.weight"] = (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = (heads * head_dim, WIDTH)
            if bias:
                weights[f"{prefix}self_attn.{name}_proj.bias"] = (heads * head_dim,)
            if head_norms and name != "v":
                weights[f"{prefix}self_attn.{name}_norm.weight"] = (head_dim,)
        weights[f"{prefix}self_attn.o_proj.weight"] = (WIDTH, HEADS * head_dim)
        weights[f"{prefix}mlp.gate_proj.weight"] = (INNER, WIDTH)
        weights[f"{prefix}mlp.up_proj.weight"] = (INNER, WIDTH)
        weights[f"{prefix}mlp.down_proj.weight"] = (WIDTH, INNER)
        weights[f"{prefix}input_layernorm.weight"] = (WIDTH,)
        weights[f"{prefix}post_attention_layernorm.weight"] = (WIDTH,)
    return weights


def _llada_weights(fused: bool) -> dict:
    weights = {"model.transformer.wte.weight": (VOCABULARY, WIDTH), "model.transformer.ln_f.weight": (WIDTH,)}
    weights["model.transformer.ff_out.weight"] = (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        prefix = f"model.transformer.blocks.{layer}."
        if fused:
            weights[f"{prefix}att_proj.weight"] = (3 * WIDTH, WIDTH)
            weights[f"{prefix}ff_proj.weight"] = (2 * INNER, WIDTH)
        else:
            weights |= {f"{prefix}{name}_proj.weight": (WIDTH, WIDTH) for name in "qkv"}
            weights |= {f"{prefix}{name}_proj.weight": (INNER, WIDTH) for name in ("ff", "up")}
        weights |= {f"{prefix}attn_out.weight": (WIDTH, WIDTH), f"{prefix}ff_out.weight": (WIDTH, INNER)}
        weights |= {f"{prefix}{name}_norm.weight": (WIDTH,) for name in ("attn", "ff")}
    return weights


_UNBIASED = dict(attention_bias=False)
PUBLISHED = {
    "llada": Published(
        {"model_type": "llada", "architectures": ["LLaDAModelLM"], **_LLADA}, _llada_weights(fused=False)
    ),
    "Dream": Published(
        {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": MASK, **_QWEN, **_WINDOW},
        _llama_weights(WIDTH // HEADS, bias=True),
    ),
    "a2d-llama": Published(
        {"model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"], **_QWEN, **_UNBIASED,
         "head_dim": HEAD_DIM, "mlp_bias": False, "pretraining_tp": 1},
        _llama_weights(HEAD_DIM),
    ),
    "a2d-qwen2": Published(
        {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"], **_QWEN, **_WINDOW},
        _llama_weights(WIDTH // HEADS, bias=True),
    ),
    "a2d-qwen3": Published(
        {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], **_QWEN, **_WINDOW, **_UNBIASED,
         "head_dim": HEAD_DIM},
        _llama_weights(HEAD_DIM, head_norms=True),
    ),
    "sdar": Published(
        {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "mask_token_id": MASK, "block_size": 4,
         "attn_implementation": "flex_attention", **_QWEN, **_WINDOW, **_UNBIASED, "head_dim": HEAD_DIM},
        _llama_weights(HEAD_DIM, head_norms=True),
    ),
}  # fmt: skip
LLADA_FUSED = Published(
    {**PUBLISHED["llada"].config, "block_type": "sequential", "activation_type": "swiglu",
     "mlp_hidden_size": 2 * INNER},
    _llada_weights(fused=True),
)  # fmt: skip
