"""The model lines that load, sample and save, one row each, and the sampling facts of a loaded model.

A checkpoint says how it was trained in the "diffusion" entry of its config.json:
    "mask_token_id": 4093,
    "diffusion": {"block_size": 32, "attention": ["block_causal", "bidirectional"], "shift": false}
A row of the table fills in what the checkpoints of a line leave unsaid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dllm_kernels.models import checkpoint_layouts as layouts
from dllm_kernels.models.checkpoint_layouts import Layout
from dllm_kernels.models.head import head_of

ATTENTION = ("block_causal", "bidirectional")


@dataclass(frozen=True)
class Family:
    """A model line.

    architecture: the transformers model_type that runs its weights, unless their layout names another.
    attention: the kinds it was trained for, the default first; (): its "diffusion" entry must say.
    shift: whether the prediction for position i comes from the output at i-1.
    masked_lm: whether it runs as a masked-LM model, not as a causal LM.
    head: what turns hidden states into logits, in turn: modules of the model and names of activations, the
    last one linear; (): the model's output embeddings, if they are seen to give the model's own logits.
    padding_first: whether positions count from padding token + 1, as in RoBERTa.
    layouts: how its checkpoints are written where that is not the stock way; the first is written.
    other_heads: the beginnings of names of weights that its checkpoints hold and its models do not, besides
    the pooler and such of all masked-LM models.
    tokenizer: the transformers class that reads its tokenizer; None: the tokenizer's files say.
    end_tokens: what ends a reply besides the end tokens of its configs.
    chat: options of its chat template.
    """

    architecture: str
    attention: tuple[str, ...] = ()
    shift: bool = False
    masked_lm: bool = False
    head: tuple[str, ...] = ("lm_head",)
    padding_first: bool = False
    layouts: tuple[Layout, ...] = ()
    other_heads: tuple[str, ...] = ()
    tokenizer: str | None = None
    end_tokens: tuple[str, ...] = ()
    chat: Mapping[str, object] = field(default_factory=dict)


_EITHER = ("bidirectional", "block_causal")
_BIDIRECTIONAL = ("bidirectional",)
_QWEN_CHAT = dict(end_tokens=("<|im_end|>",), chat={"enable_thinking": False})

FAMILIES = {
    "llada": Family(
        "llama", _BIDIRECTIONAL, end_tokens=("<|eot_id|>",),
        layouts=(layouts.LLADA, layouts.LLADA_FUSED, layouts.LLADA_QKV_BIAS, layouts.LLADA_FUSED_QKV_BIAS),
    ),
    "Dream": Family(
        "qwen2", _BIDIRECTIONAL, shift=True, layouts=(layouts.DREAM,), tokenizer="Qwen2Tokenizer",
        end_tokens=("<|im_end|>",),
    ),
    "a2d-llama": Family("llama", _EITHER, layouts=(layouts.A2D_LLAMA,), end_tokens=("<|eot_id|>",)),
    "a2d-qwen2": Family("qwen2", _EITHER, layouts=(layouts.A2D_QWEN2,), **_QWEN_CHAT),
    "a2d-qwen3": Family("qwen3", _EITHER, layouts=(layouts.A2D_QWEN3,), **_QWEN_CHAT),
    "sdar": Family("qwen3", ("block_causal",), layouts=(layouts.SDAR,), end_tokens=("<|im_end|>",)),
    "bert": Family(
        "bert", _BIDIRECTIONAL, masked_lm=True, layouts=(layouts.BERT,), end_tokens=("[SEP]",),
        head=("cls.predictions.transform", "cls.predictions.decoder"),
    ),
    "roberta": Family(
        "roberta", _BIDIRECTIONAL, masked_lm=True, padding_first=True,
        head=("lm_head.dense", "gelu", "lm_head.layer_norm", "lm_head.decoder"),
    ),
    "modernbert": Family("modernbert", _BIDIRECTIONAL, masked_lm=True, head=("head", "decoder")),
    "albert": Family(
        "albert", _BIDIRECTIONAL, masked_lm=True, end_tokens=("[SEP]",),
        head=("predictions.dense", "predictions.activation", "predictions.LayerNorm", "predictions.decoder"),
        other_heads=("sop_classifier.",),
    ),
    "llama": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "mistral": Family("mistral"),
    "gpt2": Family("gpt2"),
}  # fmt: skip


@dataclass(frozen=True)
class Diffusion:
    """The sampling facts of a loaded model; None and () if its checkpoint does not say.

    head: the functions from hidden states to logits, in turn; the last one is an nn.Linear.
    first_position: the model's number of the first position. max_positions: how many it has.
    chat: options of its chat template.
    """

    attention: str
    block_size: int | None
    shift: bool
    mask_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    vocab_size: int
    max_positions: int | None
    head: tuple[Callable, ...]
    first_position: int = 0
    chat: Mapping[str, object] = field(default_factory=dict)


def family_of(model_type: str | None, architectures: Sequence[str] | None = None) -> Family:
    """Return the row of a config.json's model_type; language models without a row run as they are.

    architectures: config.json's, which tell masked-LM models of a type from its causal LMs.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if isinstance(model_type, str):
        causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type)
        named = architectures if isinstance(architectures, list | tuple) else ()
        if masked is not None and (causal is None or masked in named):
            return Family(model_type, _BIDIRECTIONAL, masked_lm=True, head=())
        # The text model of a multimodal type has a model_type of its own, which is not listed.
        if causal is not None or any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in named):
            return Family(model_type, head=())
    raise ValueError(
        f"model_type {model_type!r:.80} is not a known family; known: {', '.join(FAMILIES)}, and every "
        "causal and masked LM of transformers"
    )


def is_masked_lm(model) -> bool:
    """Return whether `model` is of a masked-LM class of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def diffusion_of(model, *, head: bool = True, attention: str | None = None) -> Diffusion:
    """Return the sampling facts of `model`, a transformers model.

    head: whether its head must be plain; if not, callers make logits as the model does, and `head` is ().
    attention: the kind to sample with, in place of the config's.
    """
    config, text = model.config, model.config.get_text_config()  # of a multimodal model, its language part's
    # A model in memory runs as it is, whatever its type; its own forward shows whether its head is plain.
    family = FAMILIES.get(config.model_type) or Family(config.model_type, head=())
    entry = diffusion_entry(config, family)
    if attention is not None:
        entry["attention"] = [attention]
    if not entry["attention"]:
        raise ValueError(
            f"this {config.model_type} model is not marked as a diffusion model: its config has no "
            '"diffusion" entry. Set model.config.diffusion = {"attention": ["bidirectional"]} or '
            '{"attention": ["block_causal"], "block_size": 32}, and model.config.mask_token_id'
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, whose decoder would see the masked canvas "
            "shifted by one; give a model without an encoder, or a function from ids to logits"
        )
    generation = getattr(model, "generation_config", None)
    eos = token_ids(getattr(generation, "eos_token_id", None)) or token_ids(
        _either("eos_token_id", config, text)
    )
    first_position = config.pad_token_id + 1 if family.padding_first else 0
    max_positions = max_positions_of(text)
    return Diffusion(
        attention=entry["attention"][0],
        block_size=entry.get("block_size"),
        shift=entry["shift"],
        mask_id=_either("mask_token_id", config, text),
        eos_ids=eos,
        pad_id=_either("pad_token_id", config, text),
        vocab_size=text.vocab_size,
        max_positions=None if max_positions is None else max_positions - first_position,
        head=head_of(model, family) if head else (),
        first_position=first_position,
        chat=entry["chat"],
    )


def diffusion_entry(config, family: Family) -> dict:
    """Return the config's "diffusion" entry, completed from its family's row."""
    given = getattr(config, "diffusion", None) or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"config.diffusion is {given!r}; it must hold entries by name")
    entry = {"attention": family.attention, "shift": family.shift, "chat": dict(family.chat), **given}
    kinds = entry["attention"]
    if not isinstance(kinds, list | tuple):
        raise ValueError(
            f"config.diffusion has attention {kinds!r:.80}; it must list {' or '.join(ATTENTION)}"
        )
    entry["attention"] = list(kinds)
    for kind in entry["attention"]:
        if kind not in ATTENTION:
            raise ValueError(f"config.diffusion has attention {kind!r}; allowed: {', '.join(ATTENTION)}")
    size = entry.get("block_size")
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"config.diffusion has block_size {size!r}; it must be an integer >= 1")
    if not isinstance(entry["shift"], bool):
        raise ValueError(f"config.diffusion has shift {entry['shift']!r}; it must be true or false")
    if not isinstance(entry["chat"], Mapping):
        raise ValueError(f"config.diffusion has chat {entry['chat']!r:.80}; it must hold options by name")
    return entry


def max_positions_of(config) -> int | None:
    """Return how many positions a config allows: its max_position_embeddings, or what its rotary embedding
    scales the original ones to, within one chunk of layers that attend in chunks; None: any number."""
    chunk = getattr(config, "attention_chunk_size", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return chunk
    limits = [positions]
    for rope in _rope_parameters(config):
        if "dynamic" in rope["rope_type"]:
            return chunk
        original = rope.get("original_max_position_embeddings") or positions
        limits.append(int(original * (rope.get("factor") or 1)))
    return max(limits) if chunk is None else min(chunk, max(limits))


def _rope_parameters(config) -> list[Mapping[str, object]]:
    """Return the rotary embeddings of a config, of which each kind of layer may have its own."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [kind for kind in (rope, *rope.values()) if isinstance(kind, Mapping) and "rope_type" in kind]


def _either(name: str, *configs):
    """Return the first value that one of `configs` has."""
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def token_ids(ids: int | list[int] | None) -> tuple[int, ...]:
    """Return token ids as a tuple; configs hold one, several or none."""
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
