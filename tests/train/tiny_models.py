"""Tiny random models of the architectures that losses are tried on."""

import torch
import transformers

VOCABULARY, MASK = 48, 47
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=80, pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
)  # fmt: skip
_DECODER = _SIZES | dict(num_key_value_heads=1, head_dim=8)
_ENCODER = _SIZES | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_TWO_KINDS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=3)

_LONG_ROPE = dict(
    rope_type="longrope", rope_theta=100.0, short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0,
    original_max_position_embeddings=4,
)  # fmt: skip
_DYNAMIC_ROPE = dict(rope_type="dynamic", rope_theta=100.0, factor=4.0)

# (architecture, entries of its config)
MODELS = {
    "llama": ("Llama", _DECODER),
    "qwen2": ("Qwen2", _DECODER),
    "qwen2-windows": ("Qwen2", _DECODER | _TWO_KINDS | dict(use_sliding_window=True)),
    "qwen3": ("Qwen3", _DECODER | dict(tie_word_embeddings=True)),
    "qwen3-moe": (
        "Qwen3Moe",
        _DECODER
        | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, decoder_sparse_step=1),
    ),
    "mistral": ("Mistral", _DECODER | dict(sliding_window=3)),
    "gpt2": ("GPT2", _SIZES | dict(n_inner=24, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "gpt-neox": ("GPTNeoX", _SIZES | dict(hidden_dropout=0.0)),
    "gemma": ("Gemma", _DECODER | dict(tie_word_embeddings=True)),
    "gemma2": (
        "Gemma2",
        _DECODER | _TWO_KINDS | dict(final_logit_softcapping=2.0, attn_logit_softcapping=None),
    ),
    "gemma3": ("Gemma3", _DECODER | _TWO_KINDS),
    "granite": ("Granite", _DECODER | dict(logits_scaling=3.0, embedding_multiplier=2.0)),
    "cohere": ("Cohere", _DECODER | dict(logit_scale=0.25)),
    "cohere2": ("Cohere2", _DECODER | _TWO_KINDS | dict(logit_scale=0.25)),
    "olmo": ("Olmo", _DECODER),
    "olmo3": ("Olmo3", _DECODER | _TWO_KINDS),
    "phi": ("Phi", _SIZES | dict(resid_pdrop=0.0, embd_pdrop=0.0)),
    "phi3": ("Phi3", _DECODER | dict(sliding_window=3, resid_pdrop=0.0, embd_pdrop=0.0)),
    "opt": ("OPT", _SIZES | dict(ffn_dim=24, word_embed_proj_dim=16, dropout=0.0)),
    "bert": ("Bert", _ENCODER),
    "roberta": ("Roberta", _ENCODER),
    "xlm-roberta": ("XLMRoberta", _ENCODER),
    "modernbert": (
        "ModernBert",
        _ENCODER
        | dict(
            layer_types=["full_attention", "sliding_attention"], local_attention=6, mlp_dropout=0.0,
            embedding_dropout=0.0, cls_token_id=1, sep_token_id=2,
        ),
    ),
    "albert": ("Albert", _ENCODER | dict(embedding_size=8)),
}  # fmt: skip
# Each sequence of a batch is rotated by its own length, unlike in the model's own forward.
LENGTH_DEPENDENT = {
    "llama-longrope": ("Llama", _DECODER | dict(rope_parameters=_LONG_ROPE)),
    "llama-dynamic": ("Llama", _DECODER | dict(rope_parameters=_DYNAMIC_ROPE, max_position_embeddings=4)),
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert", "albert")


def tiny(name, *, gain=3.0, seed=0, attention="sdpa", **entries):
    """A float32 model in eval mode, with weights large enough that its logits are far from uniform."""
    architecture, sizes = (MODELS | LENGTH_DEPENDENT)[name]
    kind = "ForMaskedLM" if name in ENCODERS else "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    if architecture.startswith("Gemma3"):
        config = transformers.Gemma3TextConfig
    else:
        config = getattr(transformers, f"{architecture}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, architecture + kind)(config(**(sizes | entries)))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(gain)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()
