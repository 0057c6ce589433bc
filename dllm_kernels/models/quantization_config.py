"""The quantization_config of checkpoints whose linear layers are int8 or fp8, in that of compressed-tensors.

Formats "int-quantized" and "float-quantized" [github.com/vllm-project/compressed-tensors]: beside the int8 or
float8_e4m3fn `weight` [out, in] of a linear layer lies its `weight_scale` [out, groups], and the weight is
their product; groups is 1 for the strategy "channel" and in / group_size for "group", which int8 alone has.
Inputs are rounded to 8 bits per token on the fly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

METHOD, STATUS = "compressed-tensors", "compressed"
SCALE = "weight_scale"
# By the kind of weights: their dtype, the format, and the type of numbers there.
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_FORMATS = {"int8": "int-quantized", "fp8": "float-quantized"}
_TYPES = {"int8": "int", "fp8": "float"}

# What an absent entry means there, and what is read of int8.
_DEFAULTS = {
    "num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": None, "group_size": None,
    "block_structure": None, "actorder": None,
}  # fmt: skip
_WEIGHTS = {key: value for key, value in _DEFAULTS.items() if key not in ("strategy", "group_size")}
_INPUTS = {**_DEFAULTS, "dynamic": True, "strategy": "token"}
_UNUSED = {"kv_cache_scheme": (None,), "transform_config": (None, {}), "sparsity_config": (None, {})}


@dataclass(frozen=True)
class Group:
    """Layers quantized alike. targets: names, "re:…" or classes. size: inputs per scale; None: all."""

    targets: tuple[str, ...]
    size: int | None


@dataclass(frozen=True)
class QuantizationConfig:
    """Which layers of a checkpoint are int8, or fp8: kind."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    kind: str = "int8"

    @classmethod
    def of_entries(cls, entries: object) -> QuantizationConfig:
        """Return what config.json's quantization_config says; ValueError for any other kind of weights."""
        _expect(isinstance(entries, Mapping), "", entries, "entries by name")
        for name, value in (("quant_method", METHOD), ("quantization_status", STATUS)):
            _expect(entries.get(name) == value, name, entries.get(name), repr(value))
        written = entries.get("format")
        kind = next((kind for kind, name in _FORMATS.items() if name == written), None)
        _expect(kind is not None, "format", written, " or ".join(map(repr, _FORMATS.values())))
        for name, allowed in _UNUSED.items():
            _expect(entries.get(name) in allowed, name, entries.get(name), "None")
        groups, ignore = entries.get("config_groups"), entries.get("ignore") or []
        _expect(isinstance(groups, Mapping) and len(groups) > 0, "config_groups", groups, "groups by name")
        _check_names("ignore", ignore)
        return cls(tuple(_group(name, group, kind) for name, group in groups.items()), tuple(ignore), kind)

    @classmethod
    def of_layers(
        cls, sizes: Mapping[str, int | None], others: list[str], kind: str = "int8"
    ) -> QuantizationConfig:
        """Return that of layers, by name -> inputs per scale (None: all); others: names of other layers."""
        found = sorted(set(sizes.values()), key=lambda size: size or 0)
        if len(found) == 1:
            return cls((Group(("Linear",), found[0]),), tuple(others), kind)
        groups = (Group(tuple(name for name in sizes if sizes[name] == size), size) for size in found)
        return cls(tuple(groups), tuple(others), kind)

    def entries(self) -> dict:
        """Return the entries of config.json."""
        return {
            "quant_method": METHOD,
            "format": _FORMATS[self.kind],
            "quantization_status": STATUS,
            "config_groups": {
                f"group_{at}": _entries(group, _TYPES[self.kind]) for at, group in enumerate(self.groups)
            },
            "ignore": [*self.ignore],
            "kv_cache_scheme": None,
        }

    def sizes(self, layers: Mapping[str, str]) -> dict[str, int | None]:
        """Return the quantized ones of linear layers, by name -> inputs per scale.

        layers: their names -> those in the checkpoint. An exact name goes before a
        pattern, and that before a class.
        """
        found = {}
        for name, written in layers.items():
            if any(_match(target, written) for target in self.ignore):
                continue
            matches = [
                (rank, group.size)
                for group in self.groups
                for target in group.targets
                if (rank := _match(target, written))
            ]
            if matches:
                found[name] = max(matches, key=lambda match: match[0])[1]
        return found


class QuantizedLayer(nn.Module):
    """The tensors of an int8 or fp8 layer as a checkpoint holds them, on the meta device."""

    def __init__(self, linear: nn.Linear, groups: int, kind: str):
        super().__init__()
        rows = linear.out_features
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=_DTYPES[kind], device="meta"))
        self.register_buffer(SCALE, torch.empty(rows, groups, dtype=torch.float32, device="meta"))
        self.bias = linear.bias


def expect_quantized(skeleton: nn.Module, sizes: Mapping[str, int | None], kind: str) -> None:
    """Put a QuantizedLayer in the place of every layer of a model on the meta device that `sizes` names."""
    for name, size in sizes.items():
        linear = skeleton.get_submodule(name)
        if size is not None and linear.in_features % size:
            raise ValueError(
                f"config.json: quantization_config has group_size {size}, which does not divide the "
                f"{linear.in_features} inputs of {name}"
            )
        groups = linear.in_features // size if size else 1
        skeleton.set_submodule(name, QuantizedLayer(linear, groups, kind))


def _match(target: str, name: str) -> int:
    """Return how closely a target matches the linear layer `name`: 3 exactly, 2, 1, or 0 not at all."""
    if target.startswith("re:"):
        return 2 * (re.match(target.removeprefix("re:"), name) is not None)
    return 3 if target == name else int(target == "Linear")


def _group(name: str, group: object, kind: str) -> Group:
    place = f"config_groups.{name}"
    _expect(isinstance(group, Mapping), place, group, "entries by name")
    written = _FORMATS[kind]
    _expect(group.get("format") in (None, written), f"{place}.format", group.get("format"), repr(written))
    outputs = group.get("output_activations")
    _expect(outputs is None, f"{place}.output_activations", outputs, "None")
    targets, weights = group.get("targets"), group.get("weights")
    _check_names(f"{place}.targets", targets)
    _check_numbers(f"{place}.input_activations", group.get("input_activations"), _INPUTS, _TYPES[kind])
    _check_numbers(f"{place}.weights", weights, _WEIGHTS, _TYPES[kind])
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy == "group" and kind == "int8":
        whole = type(size) is int and size >= 1
        _expect(whole, f"{place}.weights.group_size", size, "an integer >= 1")
        return Group(tuple(targets), size)
    allowed = "'channel' or 'group'" if kind == "int8" else "'channel'"
    _expect(strategy == "channel", f"{place}.weights.strategy", strategy, allowed)
    _expect(size in (None, -1), f"{place}.weights.group_size", size, "None")
    return Group(tuple(targets), None)


def _check_numbers(place: str, entries: object, allowed: Mapping, numbers: str) -> None:
    _expect(isinstance(entries, Mapping), place, entries, "entries by name")
    for name, value in {**allowed, "type": numbers}.items():
        given = entries.get(name, _DEFAULTS[name])
        _expect(given == value and type(given) is type(value), f"{place}.{name}", given, repr(value))


def _check_names(place: str, names: object) -> None:
    listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    _expect(listed, place, names, "a list of names")
    for name in names:
        try:
            re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"config.json: quantization_config.{place} has {name!r:.80}: {error}") from None


def _expect(right: bool, place: str, value: object, allowed: str) -> None:
    if not right:
        raise ValueError(
            f"config.json: quantization_config{place and '.'}{place} is {value!r:.80}; quantized weights are "
            f"read where it is {allowed}"
        )


def _entries(group: Group, numbers: str) -> dict:
    weights = {
        "num_bits": 8, "type": numbers, "symmetric": True, "dynamic": False,
        "strategy": "channel" if group.size is None else "group", "group_size": group.size,
    }  # fmt: skip
    inputs = {"num_bits": 8, "type": numbers, "symmetric": True, "dynamic": True, "strategy": "token"}
    return {"targets": [*group.targets], "weights": weights, "input_activations": inputs}
