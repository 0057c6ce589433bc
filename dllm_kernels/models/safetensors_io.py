"""Weights of a model from and to safetensors files: checked against the headers, then read in turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dllm_kernels.models.checkpoint_files import INDEX, OpenFiles, Stored, write_json
from dllm_kernels.models.checkpoint_layouts import Layout
from dllm_kernels.models.conversions import Fill, stock_fills

# Buffers that transformers computes today and wrote in former versions; it ignores them too.
_FORMER_BUFFERS = (r"\.rotary_emb\.inv_freq$", r"\.attn\.masked_bias$", r"\.attention\.masked_bias$")


def plan_weights(
    skeleton: nn.Module,
    stored: Mapping[str, Stored],
    layout: Layout | None = None,
    unread: Sequence[str] = (),
) -> list[Fill]:
    """Return the fills that make every weight of a model from the tensors of a checkpoint.

    skeleton: the model on the meta device. unread: the beginnings of names that may stay in the files.
    A missing or unexpected weight, another shape or another kind of dtype is a ValueError.
    """
    state = skeleton.state_dict(keep_vars=True)
    fills, unexpected = _fills(skeleton, stored, layout)
    mismatched: list[str] = []
    source_of: dict[str, str] = {}
    for fill in fills:
        source = fill.sources[0]
        if odd := [name for name in fill.sources if isinstance(stored[name].dtype, str)]:
            mismatched.append(f"{odd[0]} is {stored[odd[0]].dtype}, which is not read")
            continue
        tensors = [torch.empty(stored[n].shape, dtype=stored[n].dtype, device="meta") for n in fill.sources]
        try:
            made = fill.weights(tensors)
        except Exception as error:  # any error of a conversion about tensors that it does not take
            mismatched.append(f"{source}: {error}")
            continue
        for name, tensor in made.items():
            if name not in state:
                unexpected.append(source)
            elif name in source_of:
                mismatched.append(f"{source} and {source_of[name]} are both {name}")
            elif reason := misfit(tensor, state[name]):
                mismatched.append(f"{source} is {reason}")
            source_of[name] = source
    filled = {id(state[name]) for name in source_of.keys() & state.keys()}
    computed = _computed(skeleton)
    missing = [name for name, tensor in state.items() if id(tensor) not in filled and name not in computed]
    patterns = (
        *(f"^{re.escape(name)}" for name in unread),
        *_FORMER_BUFFERS,
        *(getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()),
    )
    unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in patterns)]
    kinds = {"missing": missing, "unexpected": unexpected, "mismatched": mismatched}
    if wrong := {kind: sorted(names) for kind, names in kinds.items() if names}:
        raise ValueError(f"the weights do not fit {type(skeleton).__name__}: {_abridged(wrong)}")
    return fills


def fill_weights(
    model: nn.Module,
    fills: list[Fill],
    stored: Mapping[str, Stored],
    receivers: Mapping[str, Callable[[Tensor], None]] = MappingProxyType({}),
) -> None:
    """Read every weight of `model` as planned; those that `receivers` names are handed over instead.

    Besides the model, memory holds a few pages of the file being read and the result of one conversion.
    Weights that the model ties must be equal if the checkpoint holds several of them.
    """
    state = model.state_dict(keep_vars=True)
    fills = sorted(fills, key=lambda fill: stored[fill.sources[0]].file)
    last = {stored[name].file: index for index, fill in enumerate(fills) for name in fill.sources}
    files = OpenFiles()
    filled: dict[int, str] = {}
    for index, fill in enumerate(fills):
        weights = fill.weights([files.read(name, stored[name].file) for name in fill.sources])
        _fill(state, weights, filled, receivers)
        del weights  # which keeps the file mapped
        for file in {stored[name].file for name in fill.sources}:
            if last[file] == index:
                files.close(file)


def _fill(
    state: dict[str, Tensor],
    weights: dict[str, Tensor],
    filled: dict[int, str],
    receivers: Mapping[str, Callable[[Tensor], None]],
) -> None:
    """Fill weights by name. filled: ids -> names they were filled as. Only receivers keep parts of files."""
    for name, tensor in weights.items():
        if name in receivers:
            receivers[name](tensor)
            continue
        target = state[name].detach()
        twin = filled.setdefault(id(state[name]), name)
        if twin == name:
            target.copy_(tensor)
        elif not torch.equal(target, tensor.to(target)):
            raise ValueError(f"{name} differs from {twin}, to which config.json ties it")


def write_weights(state: dict[str, Tensor], folder: Path, layout: Layout, max_shard_size: str) -> None:
    """Write the weights of a model under the layout's names; of tied weights only the first one."""
    from huggingface_hub import split_torch_state_dict_into_shards

    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in own_storages(state).items():
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
    """Return `weights`, with tensors of their own for parts of a shared storage.

    Writers copy tensors that share a storage, or keep them in one shard; this copies nothing.
    """

    def is_part(tensor) -> bool:
        return type(tensor) is Tensor and tensor.nbytes < tensor.untyped_storage().nbytes()

    return {name: torch.from_dlpack(w) if is_part(w) else w for name, w in weights.items()}


def _fills(
    skeleton: nn.Module, stored: Mapping[str, Stored], layout: Layout | None
) -> tuple[list[Fill], list[str]]:
    """Return fills by the names of the layout, and of transformers for the rest, and unused names."""
    state = skeleton.state_dict()
    fills, unused, stock = [], [], []
    for name in stored:
        parts = (name,) if layout is None else layout.stock_names(name)
        if parts == (name,):
            stock.append(name)
        elif all(part in state for part in parts):
            sizes = [len(state[part]) for part in parts]
            fills.append(
                Fill((name,), lambda tensors, parts=parts, sizes=sizes: _parts(tensors[0], parts, sizes))
            )
        else:
            unused.append(name)
    more_fills, more_unused = stock_fills(skeleton, stock)
    return fills + more_fills, unused + more_unused


def _parts(tensor: Tensor, names: tuple[str, ...], sizes: list[int]) -> dict[str, Tensor]:
    """Return the weights that a tensor holds one after the other along its first dimension."""
    if len(names) == 1:
        return {names[0]: tensor}
    if tensor.dim() == 0 or len(tensor) != sum(sizes):
        raise ValueError(f"it is {[*tensor.shape]}, and must hold {' + '.join(map(str, sizes))} rows")
    return dict(zip(names, tensor.split(sizes), strict=True))


def misfit(tensor: Tensor, weight: Tensor) -> str | None:
    """Return why `tensor` cannot be read into `weight`; None if it can."""
    if tensor.shape != weight.shape:
        return f"{[*tensor.shape]}, not {[*weight.shape]}"
    floats = tensor.is_floating_point() and weight.is_floating_point()
    if tensor.dtype != weight.dtype and not (floats and tensor.dtype.itemsize > 1 < weight.dtype.itemsize):
        return f"{tensor.dtype}, not {weight.dtype}"
    return None


def _computed(model: nn.Module) -> set[str]:
    """Return the buffers that a model computes if its checkpoint lacks them."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    buffers = (name for name, _ in model.named_buffers())
    return {name for name in buffers if any(re.search(pattern, name) for pattern in patterns)}


def _abridged(wrong: dict[str, list[str]], most: int = 8) -> str:
    lists = (
        f"{kind}: {', '.join(names[:most])}" + (f" and {len(names) - most} more" if len(names) > most else "")
        for kind, names in wrong.items()
    )
    return "; ".join(lists)
