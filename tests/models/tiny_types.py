"""A tiny random model of any type that transformers lists, by shrinking what its config class says."""

import inspect

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

MASK, VOCABULARY = 117, 120
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]])

# Names of settings -> small values that go together.
_SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "emb_dim", "lru_width",
         "attention_hidden_size", "true_hidden_size", "word_embed_proj_dim", "model_dim"), 32,
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size", "decoder_ffn_dim",
         "encoder_ffn_dim", "intermediate_size_mlp", "inner_dim", "d_ff", "d_inner", "dff"), 48,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size",
         "moe_shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size",
         "moe_ffn_hidden_size"), 24,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
         "num_decoder_layers", "num_encoder_layers"), 2,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads", "linear_num_value_heads"), 4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "attention_head_dim", "mamba_d_head", "linear_key_head_dim", "linear_value_head_dim",
         "global_head_dim", "swa_head_dim", "kv_channels"), 8,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len",
         "max_seq_length"), 128,
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"), 2
    ),
    **dict.fromkeys(("image_size", "patch_size"), 14),
    **dict.fromkeys(("num_latents", "entity_emb_size"), 16),
    **dict.fromkeys(("entity_vocab_size", "pronunciation_vocab_size", "shape_vocab_size"), 50),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2),
}  # fmt: skip


# What some types need besides.
_BY_TYPE = {
    "codegen": dict(rotary_dim=4),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "gptj": dict(rotary_dim=4),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "lfm2_moe": dict(layer_types=["full_attention", "conv"]),
    "mamba2": dict(num_heads=8, head_dim=8),
    "reformer": dict(is_decoder=True, axial_pos_embds=False),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layer_types=["linear_attention", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
}
# Changes that make other types fit together, tried in turn.
_ATTEMPTS = ({}, {"num_key_value_heads": 4}, {"num_hidden_layers": 4}, {"mamba_n_heads": 6})


class NotTiny(Exception):
    """No small model of this type was found."""


def tiny_model(model_type: str, masked_lm: bool = False):
    """A random model of `model_type`, marked as trained for block-causal diffusion."""
    auto = AutoModelForMaskedLM if masked_lm else AutoModelForCausalLM
    reasons = []
    for changes in _ATTEMPTS:
        try:
            config = _tiny(CONFIG_MAPPING[model_type], changes)
            with torch.device("meta"):
                size = sum(weight.numel() for weight in auto.from_config(config).parameters())
            if size > 2e7:
                raise ValueError(f"{size:,} weights")
            torch.manual_seed(0)
            model = auto.from_config(_tiny(CONFIG_MAPPING[model_type], changes)).eval()
            with torch.no_grad():
                for weight in {id(weight): weight for weight in model.parameters()}.values():
                    weight.add_(0.1 * torch.randn_like(weight))
            if not logits(model).isfinite().all():
                raise ValueError("logits that are not finite")
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error).strip()[:150]!r}")
            continue
        model.config.mask_token_id = MASK
        model.config.diffusion = {"attention": ["block_causal"], "block_size": 4}
        return model
    raise NotTiny("; ".join(dict.fromkeys(reasons)))


def logits(model) -> torch.Tensor:
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        torch.manual_seed(0)  # of the hash functions of Reformer and its like
        return model(input_ids=IDS, **options).logits


def _tiny(kind, changes: dict, depth: int = 0):
    sizes = {**_SIZES, **changes}
    names = set(inspect.signature(kind).parameters) | set(getattr(kind, "__dataclass_fields__", ()))
    if "kv_lora_rank" in names:
        sizes["num_key_value_heads"] = 4
    if "mamba_n_heads" in names:
        sizes.setdefault("mamba_n_heads", 8)
    reduced = {name: value for name, value in sizes.items() if name in names}
    renamed = getattr(kind, "attribute_map", {}) or {}
    reduced |= {renamed[name]: value for name, value in sizes.items() if renamed.get(name) in names}
    for name, part in (getattr(kind, "sub_configs", {}) or {}).items():
        if depth < 3 and hasattr(part, "model_type") and part.__name__ != "AutoConfig":
            reduced[name] = _tiny(part, changes, depth + 1)
    return kind(**{**reduced, **_BY_TYPE.get(kind.model_type, {})})
