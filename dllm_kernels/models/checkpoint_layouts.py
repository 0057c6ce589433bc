"""Checkpoint layouts of model lines that differ from transformers: config.json and weight names.

A layout is data, read in both directions; no code of a line is needed to load or save in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_SCALES = ".weight_scale"  # beside a quantized weight


@dataclass(frozen=True)
class Layout:
    """One way to write a checkpoint that a stock architecture runs.

    model_class: what config.json calls its architecture.
    weights: names of weights -> stock names, `{}` for the layer's number. Several stock names: the tensor
    holds them one after the other along its first dimension. A name that is not listed is the stock name.
    renamed: names of config.json's entries -> names in the stock config; None: all are the same.
    required: entries that must be there.
    needs: entries -> the values that the stock architecture can run, None: the entry may be absent; the first
    is written.
    sizes: stock entries that take more than a renaming, from config.json's entries.
    architecture: the transformers model_type that runs it where that is not the family's.
    diffusion: entries -> their names in our "diffusion" entry.
    """

    model_class: str
    weights: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] | None = None
    required: tuple[str, ...] = ()
    needs: Mapping[str, tuple] = field(default_factory=dict)
    sizes: Callable[[dict], dict] = lambda entries: {}
    architecture: str | None = None
    diffusion: Mapping[str, str] = field(default_factory=dict)

    def misfits(self, entries: dict) -> list[str]:
        """Return the entries of a config.json that prevent reading its weights, with what is allowed."""
        absent = [f"{key} is absent" for key in self.required if entries.get(key) is None]
        return absent + [
            f"{key} is {entries.get(key)!r} (allowed: {', '.join(map(repr, values))})"
            for key, values in self.needs.items()
            if entries.get(key) not in values
        ]

    def stock_entries(self, entries: dict) -> dict:
        """Translate entries of config.json to those of the stock config."""
        if self.renamed is None:
            stock = {key: value for key, value in entries.items() if key not in self.diffusion}
        else:
            stock = {"bos_token_id": None, **{key: entries[key] for key in _SHARED if key in entries}}
            stock |= {ours: entries[theirs] for theirs, ours in self.renamed.items() if theirs in entries}
            stock |= self.sizes(entries)
        diffusion = {ours: entries[theirs] for theirs, ours in self.diffusion.items() if theirs in entries}
        return {**stock, "diffusion": {**diffusion, **entries.get("diffusion", {})}}

    def own_entries(self, stock: dict) -> dict:
        """Translate entries of the stock config to those of config.json, dropping those without a place."""
        stock = _with_old_rope(stock)
        if self.renamed is None:
            own = {key: value for key, value in stock.items() if key != "diffusion"}
        else:
            own = {key: values[0] for key, values in self.needs.items()}
            own |= {key: stock[key] for key in _SHARED if key in stock and key not in self.needs}
            own |= {theirs: stock[ours] for theirs, ours in self.renamed.items() if ours in stock}
        diffusion = dict(stock.get("diffusion", {}))
        own |= {theirs: diffusion.pop(ours) for theirs, ours in self.diffusion.items() if ours in diffusion}
        return {**own, "diffusion": diffusion} if diffusion else own

    def stock_names(self, name: str) -> tuple[str, ...]:
        """Return the stock names of the tensors that the weight `name`, or the scales of a weight, holds."""
        if name.endswith(_SCALES):
            return tuple(stock + "_scale" for stock in self.stock_names(name.removesuffix("_scale")))
        stock = self.weights.get(_LAYER.sub("{}", name), name)
        return _numbered((stock,) if isinstance(stock, str) else stock, name)

    def own_name(self, stock: str) -> str:
        """Return the layout's name of the weight, or of the scales of a weight, with this stock name."""
        if stock.endswith(_SCALES):
            return self.own_name(stock.removesuffix("_scale")) + "_scale"
        own = {ours: theirs for theirs, ours in self.weights.items()}.get(_LAYER.sub("{}", stock), stock)
        return _numbered((own,), stock)[0]

    def own_module_name(self, stock: str) -> str:
        """Return the layout's name of the layer with this stock name."""
        return self.own_name(f"{stock}.weight").removesuffix(".weight")


def _numbered(names: tuple[str, ...], source: str) -> tuple[str, ...]:
    """Return `names` with the layer's number of `source` in place of `{}`."""
    layer = _LAYER.search(source)
    return tuple(name.replace("{}", layer[0]) if layer else name for name in names)


def _with_old_rope(stock: dict) -> dict:
    """Return `stock` with rotary settings as separate entries, where the lines' own code looks for them."""
    if "rope_parameters" not in stock:
        return stock
    rope = dict(stock["rope_parameters"])
    theta, default = rope.pop("rope_theta"), rope["rope_type"] == "default"
    rest = {key: value for key, value in stock.items() if key != "rope_parameters"}
    return {**rest, "rope_theta": theta, "rope_scaling": None if default else rope}


# Entries that keep name and meaning where others are renamed.
_SHARED = (
    "vocab_size", "rms_norm_eps", "rope_theta", "attention_dropout", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id",
)  # fmt: skip


# ---- LLaDA: blocks as in Llama, or with the projections of a block fused -------------------------------
def _llada_sizes(entries: dict) -> dict:
    heads, fused = entries["n_heads"], entries["activation_type"] == "swiglu"
    inner = entries.get("mlp_hidden_size") or entries.get("mlp_ratio", 4) * entries["d_model"]
    shared_head = 1 if entries.get("multi_query_attention") else heads
    return {
        "vocab_size": entries.get("embedding_size") or entries["vocab_size"],
        "num_key_value_heads": entries.get("n_kv_heads") or shared_head,
        "intermediate_size": inner // 2 if fused else inner,
        "hidden_act": "silu" if fused else entries["activation_type"],
    }


_LLADA_CONFIG = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "activation_type": "hidden_act",
    "embedding_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_LLADA_REQUIRED = (
    "d_model", "n_layers", "n_heads", "vocab_size", "activation_type", "max_sequence_length", "rms_norm_eps",
    "rope_theta",
)  # fmt: skip
_LLADA_NEEDS = {
    "rope": (True,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True, None),
    "bias_for_layer_norm": (False, None),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "attention_layer_norm": (False, None),
    "input_emb_norm": (False, None),
    "alibi": (False, None),
    "scale_logits": (False, None),
    "block_group_size": (1, None),
    "embedding_dropout": (0.0, None),
    "residual_dropout": (0.0, None),
    "use_cache": (False, None, True),  # the line's own code refuses True
}
_BLOCK, _STOCK = "model.transformer.blocks.{}", "model.layers.{}"
_LLADA_WEIGHTS = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
    f"{_BLOCK}.attn_norm.weight": f"{_STOCK}.input_layernorm.weight",
    f"{_BLOCK}.attn_out.weight": f"{_STOCK}.self_attn.o_proj.weight",
    f"{_BLOCK}.ff_norm.weight": f"{_STOCK}.post_attention_layernorm.weight",
    f"{_BLOCK}.ff_out.weight": f"{_STOCK}.mlp.down_proj.weight",
}
_QKV_BIAS = {"include_qkv_bias": (True,)}  # Qwen2 has exactly these biases


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_STOCK}.self_attn.{name}_proj.{kind}" for name in "qkv")


def _separate_qkv(kind: str) -> dict[str, str]:
    return {f"{_BLOCK}.{name}_proj.{kind}": stock for name, stock in zip("qkv", _qkv(kind), strict=True)}


LLADA = Layout(
    "LLaDAModelLM",
    weights={
        **_LLADA_WEIGHTS,
        **_separate_qkv("weight"),
        f"{_BLOCK}.ff_proj.weight": f"{_STOCK}.mlp.gate_proj.weight",
        f"{_BLOCK}.up_proj.weight": f"{_STOCK}.mlp.up_proj.weight",
    },
    renamed=_LLADA_CONFIG,
    required=_LLADA_REQUIRED,
    needs={"block_type": ("llama",), "activation_type": ("silu", "gelu", "relu"), **_LLADA_NEEDS},
    sizes=_llada_sizes,
)
LLADA_FUSED = Layout(
    "LLaDAModelLM",
    weights={
        **_LLADA_WEIGHTS,
        f"{_BLOCK}.att_proj.weight": _qkv("weight"),
        f"{_BLOCK}.ff_proj.weight": (f"{_STOCK}.mlp.up_proj.weight", f"{_STOCK}.mlp.gate_proj.weight"),
    },
    renamed=_LLADA_CONFIG,
    required=_LLADA_REQUIRED,
    needs={"block_type": ("sequential",), "activation_type": ("swiglu",), **_LLADA_NEEDS},
    sizes=_llada_sizes,
)
LLADA_QKV_BIAS = replace(
    LLADA,
    weights={**LLADA.weights, **_separate_qkv("bias")},
    needs={**LLADA.needs, **_QKV_BIAS},
    architecture="qwen2",
)
LLADA_FUSED_QKV_BIAS = replace(
    LLADA_FUSED,
    weights={**LLADA_FUSED.weights, f"{_BLOCK}.att_proj.bias": _qkv("bias")},
    needs={**LLADA_FUSED.needs, **_QKV_BIAS},
    architecture="qwen2",
)

# ---- lines that took a stock architecture over under a name of their own -------------------------------
DREAM = Layout("DreamModel")
A2D_LLAMA = Layout("A2DLlamaLMHeadModel")
A2D_QWEN2 = Layout("A2DQwen2LMHeadModel")
A2D_QWEN3 = Layout("A2DQwen3LMHeadModel")
SDAR = Layout("SDARForCausalLM", diffusion={"block_size": "block_size"})

# ---- BERT: the names of its first release -----------------------------------------------------------------
_BERT_NORMS = (
    "bert.embeddings.LayerNorm",
    "bert.encoder.layer.{}.attention.output.LayerNorm",
    "bert.encoder.layer.{}.output.LayerNorm",
    "cls.predictions.transform.LayerNorm",
)
BERT = Layout(
    "BertForMaskedLM",
    weights={
        f"{norm}.{old}": f"{norm}.{new}"
        for norm in _BERT_NORMS
        for old, new in (("gamma", "weight"), ("beta", "bias"))
    },
)
