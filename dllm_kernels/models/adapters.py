"""Put a peft adapter of a folder on its base model, and merge it in."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from dllm_kernels.models.checkpoint_files import ADAPTER, INDEX, WEIGHTS, read_json
from dllm_kernels.models.staging import CONFIG
from dllm_kernels.models.tokenizer_files import read_tokenizer


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a peft adapter and no whole model; ValueError if it holds both."""
    if not (folder / ADAPTER).is_file():
        return False
    whole = (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    if whole:
        raise ValueError(
            f"{folder} holds a whole model and a peft adapter ({ADAPTER}), which is ambiguous; "
            "move one of them to another folder"
        )
    return True


def base_name(folder: Path, base: str | Path | None = None) -> str | Path:
    """Return the base model of an adapter: `base`, else what its adapter_config.json says."""
    if base is not None:
        return base
    name = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{folder / ADAPTER} has base_model_name_or_path {name!r}; name the model with base="
        )
    return name


def own_tokenizer(folder: Path, config, tokenizer):
    """Return the tokenizer that was saved with an adapter, else the base model's."""
    found = read_tokenizer(folder, config, None)
    return tokenizer if found is None else found


def merge_adapter_into(model, folder: Path) -> None:
    """Merge the adapter of `folder` into `model`, which stays a stock model of its class.

    Modules that the adapter replaces (modules_to_save) and embeddings that it saved are taken from it; a
    vocabulary that it grew is grown. Tied embeddings of which only one was trained are untied. A weight that
    is missing, left over or of another shape, as in an adapter of another model, is a ValueError.
    """
    try:
        from peft import PeftConfig, get_peft_model
        from peft.utils import load_peft_weights
    except ImportError:
        raise ImportError(f"{folder} holds a peft adapter; install the package peft to load it") from None
    _check_kind(folder)
    gradients = {name: weight.requires_grad for name, weight in model.named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft, about a base model that it did not load itself
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            weights = load_peft_weights(str(folder), device="cpu")
            _grow(model, weights)
            tied = _untie(model)
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
            result = adapted.load_adapter(str(folder), "default", autocast_adapter_dtype=False)
            wrong = {"missing": result.missing_keys, "unexpected": result.unexpected_keys}
            if wrong := {kind: sorted(names)[:4] for kind, names in wrong.items() if names}:
                raise ValueError("; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items()))
            merged = adapted.merge_and_unload(safe_merge=True)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # any error of peft about files and models that do not match
        raise ValueError(
            f"the adapter of {folder} does not fit this {type(model).__name__}: {error}"
        ) from error
    if merged is not model:
        raise ValueError(f"the adapter of {folder} cannot be merged into a {type(model).__name__}")
    if tied:
        _tie_if_equal(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(gradients.get(name, True))


def _check_kind(folder: Path) -> None:
    kind = read_json(folder / ADAPTER).get("peft_type")
    if kind in (
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "CPT",
        "ADAPTION_PROMPT",
    ):
        raise ValueError(f"{folder} holds a learned prompt ({kind}), which cannot be merged into weights")


def _grow(model, weights: dict[str, torch.Tensor]) -> None:
    """Grow the vocabulary of `model` to that of the embeddings among an adapter's weights."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    rows = len(embedding.weight)
    for key, weight in weights.items():
        place = key.removeprefix("base_model.model.").removeprefix(name)
        if key.startswith(f"base_model.model.{name}."):
            if place in (".weight", ".base_layer.weight", ".modules_to_save.weight"):
                rows = max(rows, weight.shape[0])
            elif place == ".lora_embedding_A":
                rows = max(rows, weight.shape[1])
    if rows > len(embedding.weight):
        model.resize_token_embeddings(rows, mean_resizing=False)


@torch.no_grad()
def _untie(model) -> bool:
    """Give the head its own weight if the embedding is merged into; return whether they were tied.

    An adapter on one of them alone computes with the other as it was.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    head.weight = torch.nn.Parameter(embedding.weight.clone())
    return True


def _tie_if_equal(model) -> None:
    """Tie head and embedding again if merging left them equal, and record in the config whether they are."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    equal = torch.equal(head.weight, embedding.weight)
    if equal:
        head.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = equal
