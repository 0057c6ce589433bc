"""Slots kept from one call to the next, with what was recorded over them.

A graph holds addresses and constants: it serves another call whose model has its weights at the same places
and whose options come to the same launches. One DeviceSlots is kept for each model, the latest, as long as
the model lives; who wants its memory back calls `forget`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.device_slots import DeviceSlots
from dllm_kernels.sampling.job import Job
from dllm_kernels.sampling.rules import Rule

KEPT_ON = ("cuda",)  # devices; elsewhere nothing is recorded, so that there is nothing to keep

# Options that only the host reads: what follows from them is in tensors, or is compared itself.
_OF_THE_HOST = {
    "max_new_tokens", "steps", "steps_per_block", "seed", "rule", "threshold", "factor", "entropy_bound",
    "strict", "confidence", "schedule", "stochastic", "alg_temp", "eps", "cache", "refresh_every",
    "suffix_window", "cfg_keep_tokens", "shift", "mask_id", "eos_ids", "stop_on_eos", "chat", "max_batch",
}  # fmt: skip


class _Kept(NamedTuple):
    key: tuple
    slots: DeviceSlots


_KEPT: WeakKeyDictionary[torch.nn.Module, _Kept] = WeakKeyDictionary()


@contextmanager
def slots_of(job: Job, key: tuple, pages: int, make: Callable[[], DeviceSlots]) -> Iterator[DeviceSlots]:
    """Slots for one call: those kept for its model if they are of the same `key` and have so many pages, else
    new ones. A call that fails leaves none, and one that runs beside another has its own."""
    kept, model = _KEPT.pop(job.model, None), job.model
    if kept is not None and (kept.key != key or kept.slots.cache.pages < pages):
        kept = None  # its memory is free before the new slots need theirs
    slots = make() if kept is None else kept.slots
    try:
        yield slots
    finally:
        if slots.device.type == "cuda":  # nothing is under way when another stream takes or frees them
            torch.cuda.current_stream(slots.device).synchronize()
    if slots.device.type in KEPT_ON:
        _KEPT[model] = _Kept(key, slots)


def forget(model: torch.nn.Module) -> None:
    """Free what is kept for `model`: its pages and its graphs."""
    _KEPT.pop(model, None)


def recorded_with(job: Job, rule: Rule, *shapes) -> tuple:
    """All that launches depend on beside their tensors; equal tuples come to the same launches."""
    config, kind = job.config, job.device.type
    draws = config.temperature > 0 or rule.confidence == "random" or rule.alg_temp > 0
    options = [field.name for field in fields(SampleConfig) if field.name not in _OF_THE_HOST]
    return (
        *(getattr(config, name) for name in options),
        *(rule, config.seed if draws else None, job.scheme, job.mask_id, job.shift, *shapes),
        *(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        *(torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        *map(_state_of, job.model.modules()),
    )


_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def _state_of(module: torch.nn.Module) -> tuple:
    """Where a module's weights lie, and what else it is made of: its parts, hooks and settings. Of what is
    neither a weight nor plain only the identity is seen."""
    weights = []
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            weights += tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()
        elif tensor is not None:
            weights.append(object())  # of others' making, with its memory elsewhere: equal to nothing
    return type(module), *weights, *((name, _seen(value)) for name, value in vars(module).items())


def _seen(value) -> object:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return tuple((name, _seen(entry)) for name, entry in value.items())
    if isinstance(value, list | tuple | set):
        return tuple(map(_seen, value))
    if isinstance(value, partial):  # that and methods are bound anew for every call
        return id(value.func), *map(id, value.args)
    return id(getattr(value, "__func__", value))
