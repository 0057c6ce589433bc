"""Merge a peft adapter into its base model and write the result as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

import dllm_kernels as dk
from dllm_kernels.models.adapters import is_adapter
from dllm_kernels.models.checkpoint import checkpoint_folder
from dllm_train.conversion.sources import read_source
from dllm_train.conversion.target import free_target


def merge_adapter(
    adapter: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    layout: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `adapter` merged into its base model to the folder `target`, and return the folder.

    adapter: a folder or hub name of a peft adapter. base: its base model, in place of the one that its
    adapter_config.json names; a causal LM stays one. dtype: of the weights; None keeps the base model's.
    layout, overwrite: as in `convert`.

    Modules that the adapter replaces, embeddings that it saved and its tokenizer are part of the result.
    ValueError: a folder without an adapter, a base model that is missing or does not fit.
    """
    target = free_target(adapter, target, overwrite, name="adapter")
    if not is_adapter(checkpoint_folder(adapter)):
        raise ValueError(f"adapter is {str(adapter)!r}, which holds a whole model and no peft adapter")
    model, tokenizer = read_source(adapter, dtype, base=base)
    if not model.config.diffusion["attention"]:
        del model.config.diffusion
    dk.save(model, tokenizer, target, layout=layout)
    return target
