"""Read a language model in any format that transformers reads: safetensors, pickled weights, GGUF."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from dllm_kernels.models.adapters import base_name, is_adapter, merge_adapter_into, own_tokenizer
from dllm_kernels.models.checkpoint import checkpoint_folder, read_checkpoint
from dllm_kernels.models.checkpoint_files import INDEX, WEIGHTS, read_json, stored_tensors
from dllm_kernels.models.families import family_of
from dllm_kernels.models.staging import CONFIG
from dllm_kernels.models.stored_weights import store_weights
from dllm_kernels.models.tokenizer_files import read_tokenizer
from dllm_train.conversion.through_transformers import read_gguf, read_pickled

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CPU = torch.device("cpu")


def read_source(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    tokenizer=None,
    base: str | Path | None = None,
    weights: str | None = None,
):
    """Return (model, tokenizer), the model on the CPU; its config's "diffusion" entry is complete.

    dtype: None keeps that of the largest weight; GGUF files give float32. tokenizer: one to take in place of
    the source's, or a folder that has one. base: of a peft adapter, in place of the model that it names.
    weights: "bfloat16" or "int8" for linear layers that store theirs so; None as the source has them; "stock"
    for stock layers. A missing or unexpected weight or a wrong shape is a ValueError. No code of the source
    is run.
    """
    dtype = _checked(dtype)
    stored = None if weights == "stock" else weights
    if Path(source).suffix == ".gguf":
        model, own = read_gguf(Path(source).expanduser(), dtype or torch.float32, tokenizer is None, stored)
    else:
        folder = _folder(source)
        if is_adapter(folder):
            model, own = _read_adapted(folder, base, dtype)
            if stored is not None:
                store_weights(model, stored)
            return model, own if tokenizer is None else _given(tokenizer)
        if base is not None:
            raise ValueError(f"base is {str(base)!r}, but {source} is a whole model and no adapter")
        _refuse_headless(folder)
        if any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
            dtype = dtype or _stored_dtype(folder)
            model, own = read_checkpoint(folder, _CPU, dtype, trained=False, weights=weights)
        else:
            model, own = read_pickled(folder, dtype, tokenizer is None)
            if stored is not None:
                store_weights(model, stored)
    return model, own if tokenizer is None else _given(tokenizer)


def _read_adapted(folder: Path, base: str | Path | None, dtype: torch.dtype | None):
    name = base_name(folder, base)
    try:
        model, tokenizer = read_source(name, dtype, weights="stock")
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder} is an adapter of {str(name)!r}: {error}; base= names another") from error
    merge_adapter_into(model, folder)
    return model, own_tokenizer(folder, model.config, tokenizer)


def _folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if not (folder / CONFIG).is_file() and (found := sorted(folder.glob("*.gguf"))):
        raise ValueError(f"{folder} holds no {CONFIG}; give one of its files, such as {found[0]}")
    return checkpoint_folder(source)


def _refuse_headless(folder: Path) -> None:
    """Refuse encoders without a language-model head by the name of their class."""
    entries = read_json(folder / CONFIG)
    names = entries.get("architectures") or []
    if family_of(entries.get("model_type"), names).masked_lm and names and names[0].endswith("Model"):
        raise ValueError(
            f"{folder} holds a {names[0]}, an encoder without a language-model head; give a checkpoint of "
            f"{names[0].removesuffix('Model')}ForMaskedLM"
        )


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the largest weight that is not quantized."""
    floats = [tensor for tensor in stored_tensors(folder).values() if tensor.dtype in _DTYPES]
    return max(floats, key=lambda tensor: math.prod(tensor.shape)).dtype if floats else torch.float32


def _given(tokenizer):
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    found = read_tokenizer(Path(tokenizer).expanduser(), None, None)
    if found is None:
        raise ValueError(f"tokenizer is {tokenizer}, a folder without one")
    return found


def _checked(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is not None and found not in _DTYPES:
        raise TypeError(f"dtype is {dtype!r}; allowed: {', '.join(map(str, _DTYPES))}, None")
    return found
