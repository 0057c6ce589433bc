"""A checkpoint's files: weights, read into a model one tensor at a time, and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm_kernels.models.layouts import Layout

WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"


def read_weights(
    model: torch.nn.Module, folder: Path, layout: Layout | None = None, unread: tuple[str, ...] = ()
) -> None:
    """Fill every weight of `model` from the checkpoint in `folder`.

    A weight that is missing, left over or of another shape is an error. unread: the beginnings of names that
    may stay in the file. Besides the model only pages of the file that is being read are in memory.
    """
    state = model.state_dict()
    layout = layout or Layout(type(model).__name__)
    patterns = (*map(re.escape, unread), *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    filled: dict[int, str] = {}
    unexpected, mismatched = [], []
    for name, shape, read in _tensors(folder):
        parts = layout.stock_names(name)
        if not all(part in state for part in parts):
            if not any(re.search(pattern, name) for pattern in patterns):
                unexpected.append(name)
            continue
        targets = [state[part] for part in parts]
        needed = list(targets[0].shape)
        if len(parts) > 1:
            needed[0] = sum(len(target) for target in targets)
        if shape != needed:
            mismatched.append(f"{name} is {shape}, not {needed}")
            filled |= {target.data_ptr(): name for target in targets}
            continue
        for part, target in zip(parts, targets, strict=True):
            twin = filled.setdefault(target.data_ptr(), part)
            if twin != part and not torch.equal(target, read().to(target)):
                mismatched.append(f"{part} differs from {twin}, to which config.json ties it")
        _copy(read(), targets)
    missing = [name for name, tensor in state.items() if tensor.data_ptr() not in filled]
    kinds = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    if wrong := {kind: sorted(names) for kind, names in kinds.items() if names}:
        raise ValueError(f"the weights of {str(folder)!r} do not fit {type(model).__name__}: {wrong}")


def _copy(source: Tensor, targets: list[Tensor]) -> None:
    """Fill `targets` with what `source` holds one after the other; no part of the file outlives the call."""
    if len(targets) == 1:
        targets[0].copy_(source)
        return
    for target, part in zip(targets, source.split([len(target) for target in targets]), strict=True):
        target.copy_(part)


def read_json(path: Path) -> dict:
    """The entries of a checkpoint's JSON file."""
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}, not entries by name")
    return entries


def write_json(path: Path, entries: dict) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n")


def write_weights(model: torch.nn.Module, folder: Path, layout: Layout, max_shard_size: str) -> None:
    """The weights of `model` under the layout's names; of tied weights the first one alone."""
    from huggingface_hub import split_torch_state_dict_into_shards

    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in own_storages(model.state_dict()).items():
        if tensor.data_ptr() not in seen:
            weights[layout.own_name(name)] = tensor.contiguous()
            seen.add(tensor.data_ptr())
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)


def own_storages(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights`, those that are parts of a storage as tensors that know of no other part.

    Writers copy tensors that share a storage, or keep them in one shard; here nothing is copied.
    """

    def is_part(tensor) -> bool:
        return type(tensor) is Tensor and tensor.nbytes < tensor.untyped_storage().nbytes()

    return {name: torch.from_dlpack(w) if is_part(w) else w for name, w in weights.items()}


def _tensors(folder: Path) -> Iterator[tuple[str, list[int], Callable[[], Tensor]]]:
    """Name, shape and reader of every tensor of a checkpoint, one file open at a time."""
    for path, indexed in _files(folder).items():
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if lacking := sorted(indexed - names):
                    raise ValueError(f"{path} lacks {lacking[0]}, which {INDEX} says it holds")
                for name in sorted(names):
                    yield name, file.get_slice(name).get_shape(), lambda name=name: file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files that hold the weights, each with the names the index gives it (none: no index)."""
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder} holds no {WEIGHTS} and no {INDEX}; other formats are not read")
        return {folder / WEIGHTS: set()}
    files: dict[Path, set[str]] = {}
    for name, file in read_json(folder / INDEX).get("weight_map", {}).items():
        if Path(file).name != file or not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / INDEX} names {file!r}, which is not in the folder")
        files.setdefault(folder / file, set()).add(name)
    return files
