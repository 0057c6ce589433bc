"""Rotary embeddings whose frequencies depend on the length of the sequence: LongRoPE and dynamic NTK scaling.

transformers picks their frequencies in every forward from its largest position, and dynamic NTK scaling
remembers the longest one. A forward over cached keys, or over several rows, would mix frequencies. Sampling
fixes them in every step to those of a row's whole canvas, and losses to those of each row or packed document.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

_FIXED = "fixed"  # a rope_type that transformers does not update


class LengthDependentRotary:
    """The rotary modules of a model whose frequencies depend on length; false if there are none."""

    def __init__(self, model: nn.Module):
        kinds = {module: _rope_types(module) for module in model.modules()}
        self._parts = [
            (weakref.ref(module), rope_types)
            for module, rope_types in kinds.items()
            if any(map(_depends_on_length, rope_types.values()))
        ]
        self._lock = threading.RLock()
        self._latest: tuple[tuple, list[nn.Module]] | None = None

    def __bool__(self) -> bool:
        return bool(self._parts)

    def scaling_of(self, length: int) -> tuple:
        """Return a key of the frequencies: rows of equal scaling rotate alike."""
        return tuple(
            _scaling(part(), rope_type, layer_type, length)
            for part, rope_types in self._parts
            for layer_type, rope_type in rope_types.items()
        )

    @contextmanager
    def fixed(self, length: int) -> Iterator[None]:
        """Rotate as for `length` positions within this context, which holds one thread at a time."""
        if not self._parts:
            yield
            return
        with self._lock:
            parts = [part() for part, _ in self._parts]
            key = self.scaling_of(length), [next(part.buffers()).device for part in parts]
            if self._latest is None or self._latest[0] != key:
                self._latest = key, [_fixed_copy(part, length) for part in parts]
            before = [dict(vars(part)) for part in parts]
            try:
                for part, fixed in zip(parts, self._latest[1], strict=True):
                    vars(part).update(vars(fixed))
                yield
            finally:
                for part, state in zip(parts, before, strict=True):
                    vars(part).clear()
                    vars(part).update(state)

    @contextmanager
    def fixed_for_each(self, lengths: Tensor) -> Iterator[None]:
        """Rotate every token as for the length of its own sequence. lengths: int64 [B, S], of each token."""
        distinct, place = lengths.cpu().unique(return_inverse=True)
        scalings = [self.scaling_of(length) for length in distinct.tolist()]
        longest = dict(zip(scalings, distinct.tolist(), strict=True))
        if len(longest) < 2:
            with self.fixed(max(longest.values(), default=1)):
                yield
            return
        kinds = [*longest]
        choice = torch.tensor([kinds.index(scaling) for scaling in scalings])[place]
        with self._lock:
            parts = [part() for part, _ in self._parts]
            before = [vars(part).get("forward") for part in parts]
            for part in parts:
                copies = [_fixed_copy(part, length) for length in longest.values()]
                part.forward = partial(_chosen_rotation, copies, choice)
            try:
                yield
            finally:
                for part, forward in zip(parts, before, strict=True):
                    del part.forward
                    if forward is not None:
                        part.forward = forward


_rotaries: weakref.WeakKeyDictionary[nn.Module, LengthDependentRotary] = weakref.WeakKeyDictionary()


def rotary_of(model: nn.Module) -> LengthDependentRotary:
    """Return the length-dependent rotary modules of `model`, found once."""
    if model not in _rotaries:
        _rotaries[model] = LengthDependentRotary(model)
    return _rotaries[model]


def _chosen_rotation(copies: list[nn.Module], choice: Tensor, *arguments, **options):
    """Return what a rotary module returns, per token that of one of its `copies`. choice: int64 [B, S]."""
    rotations = [copy(*arguments, **options) for copy in copies]

    def chosen(tables: Sequence[Tensor]) -> Tensor:
        table, number = tables[0], choice.to(tables[0].device)[..., None]
        for other in range(1, len(tables)):
            table = torch.where(number == other, tables[other], table)
        return table

    if isinstance(rotations[0], Tensor):
        return chosen(rotations)
    return tuple(map(chosen, zip(*rotations, strict=True)))


def _rope_types(module: nn.Module | None) -> dict[str | None, str]:
    """Return the rotary embedding of each layer type, None: of all layers; {}: this is no rotary module."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return {None: kinds}
    return kinds if isinstance(kinds, dict) else {}


def _depends_on_length(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _scaling(module: nn.Module, rope_type: str, layer_type: str | None, length: int) -> object:
    if rope_type == "longrope":
        rope = module.config.rope_parameters
        rope = rope if layer_type is None else rope[layer_type]
        return length > rope["original_max_position_embeddings"]
    return max(length, module.original_max_seq_len) if "dynamic" in rope_type else None


@torch.inference_mode(False)
@torch.no_grad()
def _fixed_copy(module: nn.Module, length: int) -> nn.Module:
    """Return a copy of a rotary module, as a new one would be after a forward over `length` positions."""
    fixed, kinds = copy.deepcopy(module, {id(module.config): module.config}), _rope_types(module)
    device = next(fixed.buffers()).device
    last = torch.full((1, 1), length - 1, device=device)
    for layer_type in kinds:
        prefix, options = ("", {}) if layer_type is None else (f"{layer_type}_", {"layer_type": layer_type})
        original = getattr(fixed, f"{prefix}original_inv_freq").to(device)
        setattr(fixed, f"{prefix}inv_freq", original.clone())
        setattr(fixed, f"{prefix}max_seq_len_cached", fixed.original_max_seq_len)
        fixed(torch.zeros(1, device=device), last, **options)
    fixed.rope_type = _FIXED if None in kinds else dict.fromkeys(kinds, _FIXED)
    return fixed
