"""Reconcile the settings of an objective in model, tokenizer and arguments, and write them to the model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from transformers import PreTrainedModel

from dllm_kernels._arguments import integer
from dllm_kernels.models.attention import NAME, see_as_trained
from dllm_kernels.models.families import FAMILIES, Family, diffusion_entry, token_ids
from dllm_train.model_loss import wrapped_model

DEFAULT_BLOCK_SIZE = 32
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class ObjectiveSettings:
    """The mask token, BOS, logit shift and block size (None without blocks) that a model is trained with."""

    mask_id: int
    bos_id: int | None
    shift: bool
    block_size: int | None


def objective_settings(
    model,
    tokenizer,
    *,
    trainer: str,
    attention: str,
    default_shift: bool,
    mask_id: int | None = None,
    bos_id: int | None = None,
    shift: bool | None = None,
    block_size: int | None = None,
) -> ObjectiveSettings:
    """Return the settings of an objective; None is read from config.json, then from the tokenizer.

    model: a transformers model or a wrapper of one. trainer: its name, for errors. attention: what the
    objective trains, "bidirectional" | "block_causal". The settings are written to the model's config, as
    config.diffusion and config.mask_token_id, so that its checkpoints load with `dk.load`.
    Raises ValueError if model, tokenizer and arguments conflict.
    """
    inner = wrapped_model(model)
    config = inner.config
    entry = diffusion_entry(config, FAMILIES.get(config.model_type) or Family(config.model_type))
    kinds = entry["attention"]
    if kinds and attention not in kinds:
        raise ValueError(
            f"{trainer} trains {attention} attention, and config.diffusion of the model says {kinds}. Use "
            "the trainer of that attention, convert the model (dllm_train.convert), or, to retrain it, "
            "set "
            f'model.config.diffusion = {{"attention": ["{attention}"]}}'
        )
    said = (getattr(config, "diffusion", None) or {}).get("shift")
    if shift is not None and said is not None and shift != said:
        raise ValueError(
            f"shift is {shift}, and config.diffusion of the model says {said}; shift=None keeps that"
        )
    if shift is None:
        shift = entry["shift"] if kinds and (said is not None or entry["shift"]) else default_shift
    mask_id = _mask_id(config, inner, tokenizer, mask_id)
    _refuse_attention_dropout(inner, config)
    if bos_id is not None:
        bos_id = integer("bos_id", bos_id, 0, _words(inner) - 1)
    settings = ObjectiveSettings(
        mask_id, _first(bos_id, _of(config, "bos_token_id"), getattr(tokenizer, "bos_token_id", None)), shift,
        _block_size(entry.get("block_size"), block_size) if attention == "block_causal" else None,
    )  # fmt: skip
    _mark(model, inner, entry, settings, attention)
    return settings


def _mask_id(config, model: PreTrainedModel, tokenizer, given: int | None) -> int:
    said = {
        "mask_id": given,
        "mask_token_id of the model's config": _of(config, "mask_token_id"),
        "mask_token_id of the tokenizer": getattr(tokenizer, "mask_token_id", None),
    }
    said = {name: value for name, value in said.items() if value is not None}
    if not said:
        raise ValueError(
            "no mask token is known: mask_id is None, and neither the model's config nor the tokenizer has a "
            "mask_token_id. Convert the model (dllm_train.convert adds one), or give mask_id"
        )
    if len(set(said.values())) > 1:
        raise ValueError("the mask token is not one: " + ", ".join(f"{k} is {v}" for k, v in said.items()))
    name, mask_id = next(iter(said.items()))
    integer(name, mask_id, 0, _words(model) - 1)
    for other in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if mask_id in token_ids(_of(config, other)):
            raise ValueError(
                f"{name} is {mask_id}, which is the {other} too; the mask token needs its own id"
            )
    return mask_id


def _words(model: PreTrainedModel) -> int:
    """Return the number of tokens that have an embedding."""
    embedding, config = model.get_input_embeddings(), model.config.get_text_config()
    return getattr(embedding, "num_embeddings", config.vocab_size)


def _block_size(said: int | None, given: int | None) -> int:
    if given is None:
        return said or DEFAULT_BLOCK_SIZE
    given = integer("block_size", given, 1)
    if said not in (None, given):
        warnings.warn(
            f"block_size is {given}, and the model was trained with {said}; its checkpoints will say {given}",
            stacklevel=5,
        )
    return given


def _refuse_attention_dropout(model: PreTrainedModel, config) -> None:
    if config._attn_implementation != NAME:
        return
    for name in _ATTENTION_DROPOUT:
        rate = _of(config, name)
        if rate:
            raise ValueError(
                f"config.{name} of this {type(model).__name__} is {rate}, and attention of implementation "
                f"{NAME!r} has no dropout: load the model with {name}=0.0, or train it on "
                'model.set_attn_implementation("sdpa")'
            )


def _mark(model, inner: PreTrainedModel, entry: dict, settings: ObjectiveSettings, attention: str) -> None:
    """Write the training to the config of later checkpoints: its attention becomes the default."""
    config, kinds = inner.config, entry["attention"]
    adapted = hasattr(model, "peft_config")
    if not (adapted and kinds):
        kinds = [attention, *(kind for kind in kinds if kind != attention)]
    marks = {"attention": kinds, "shift": settings.shift}
    if settings.block_size is not None:
        marks["block_size"] = settings.block_size
    new = {name: value for name, value in marks.items() if entry.get(name) != value}
    if new and adapted:
        raise ValueError(
            f"config.diffusion of the model under the adapter would change to {new}, and checkpoints of an "
            "adapter hold no config to say so. Convert the model first (dllm_train.convert), or set its "
            "config.diffusion and save it with dk.save"
        )
    config.diffusion = {**(getattr(config, "diffusion", None) or {}), **marks}
    config.mask_token_id = settings.mask_id
    if new:
        see_as_trained(inner)


def _of(config, name: str):
    """Return a setting of the language model, which is a part of multimodal ones."""
    return _first(getattr(config, name, None), getattr(config.get_text_config(), name, None))


def _first(*values):
    return next((value for value in values if value is not None), None)
