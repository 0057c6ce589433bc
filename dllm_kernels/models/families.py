"""The model lines that load and sample, one row each, and what sampling reads off a loaded model.

A checkpoint says how it was trained in the "diffusion" entry of its config.json:
    "mask_token_id": 4093,
    "diffusion": {"block_size": 32, "attention": ["block_causal", "bidirectional"], "shift": false}
A row of the table fills in what the checkpoints of a line leave unsaid.
"""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION = ("block_causal", "bidirectional")


@dataclass(frozen=True)
class Family:
    """A model line.

    architecture: the transformers model_type that runs its weights.
    attention: the kinds it was trained for, the default first; (): its "diffusion" entry must say.
    shift: whether the prediction for position i comes from the output at i-1.
    head: what turns the base model's hidden states into logits, attributes applied in turn.
    """

    architecture: str
    attention: tuple[str, ...] = ()
    shift: bool = False
    head: tuple[str, ...] = ("lm_head",)


FAMILIES = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "mistral": Family("mistral"),
    "gpt2": Family("gpt2"),
    "a2d-llama": Family("llama", attention=("bidirectional", "block_causal")),
    "a2d-qwen2": Family("qwen2", attention=("bidirectional", "block_causal")),
    "a2d-qwen3": Family("qwen3", attention=("bidirectional", "block_causal")),
}


@dataclass(frozen=True)
class Diffusion:
    """How a loaded model samples; None and () where its checkpoint says nothing."""

    attention: str
    block_size: int | None
    shift: bool
    mask_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    vocab_size: int
    max_positions: int | None
    head: tuple[str, ...]


def family_of(model_type: str | None) -> Family:
    """The row of a config.json's model_type."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not a known family; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def diffusion_of(model) -> Diffusion:
    """What `model`, a transformers model, says of its diffusion training."""
    config = model.config
    family = family_of(config.model_type)
    entry = diffusion_entry(config, family)
    if not entry["attention"]:
        raise ValueError(
            f"this {config.model_type} model is not marked as a diffusion model: its config has no "
            '"diffusion" entry. Set model.config.diffusion = {"attention": ["bidirectional"]} or '
            '{"attention": ["block_causal"], "block_size": 32}, and model.config.mask_token_id'
        )
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    return Diffusion(
        attention=entry["attention"][0],
        block_size=entry.get("block_size"),
        shift=entry["shift"],
        mask_id=getattr(config, "mask_token_id", None),
        eos_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        pad_id=config.pad_token_id,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        head=family.head,
    )


def diffusion_entry(config, family: Family) -> dict:
    """The config's "diffusion" entry, filled up from its family's row."""
    entry = {
        "attention": family.attention,
        "shift": family.shift,
        **(getattr(config, "diffusion", None) or {}),
    }
    entry["attention"] = list(entry["attention"])
    for kind in entry["attention"]:
        if kind not in ATTENTION:
            raise ValueError(f"config.diffusion has attention {kind!r}; allowed: {', '.join(ATTENTION)}")
    return entry
