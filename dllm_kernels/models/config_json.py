"""config.json of a checkpoint as a stock transformers config, checked before anything is built, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from dllm_kernels.models.checkpoint_layouts import Layout
from dllm_kernels.models.families import FAMILIES, Family, diffusion_entry, token_ids

# What it says of files and software, not of the model. Names of attention and expert code may be those of hub
# repositories, so they are dropped from nested configs too.
_SOFTWARE = {
    "auto_map", "transformers_version", "_name_or_path", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal", "_commit_hash", "use_kernels",
}  # fmt: skip
_NOT_OF_THE_MODEL = {
    "model_type", "architectures", "dtype", "torch_dtype", "quantization_config", *_SOFTWARE
}  # fmt: skip

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
_LEAST = {"sliding_window": 0, "attention_chunk_size": 1}  # Qwen2-MoE writes 0 for no window
_TOKENS = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
_MOST_LAYERS = 10_000
_LAYER_COUNT = re.compile(r"(.*_)?n(um)?_(.*_)?layers?|decoder_layers|encoder_layers")


def read_config(entries: dict, family: Family):
    """Return the stock config of config.json's entries and the layout of the weights.

    The config's "diffusion" entry is complete. An invalid entry is a ValueError that names it.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    layout = _layout(entries, family)
    architecture = family.architecture
    if layout is not None:
        architecture = layout.architecture or architecture
        try:
            entries = layout.stock_entries(entries)
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"config.json: {error}") from None
    entries = _of_the_model(entries, _NOT_OF_THE_MODEL)
    _check_entries(entries)
    if architecture not in transformers.CONFIG_MAPPING:
        raise ValueError(f"config.json: model_type {architecture!r:.80} is unknown to transformers")
    kind = transformers.CONFIG_MAPPING[architecture]
    for key in entries:
        if callable(getattr(kind, key, None)):
            raise ValueError(f"config.json: {key} is not a setting of a {kind.__name__}")
    try:
        config = kind.from_dict(entries)
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {error}") from None
    except Exception as error:  # any error of a config class from entries that it does not check
        raise ValueError(f"config.json: {kind.__name__} raises {type(error).__name__}: {error}") from error
    _check(config)
    config.diffusion = diffusion_entry(config, family)
    return config, layout


def own_entries(config, name: str) -> tuple[dict, Layout] | None:
    """Return config.json of a model in a family's own layout, and that layout; None for the stock layout.

    Reading it back must give the same config: settings that the layout cannot express are refused.
    """
    architecture = config.model_type
    fitting = {
        name: family.layouts
        for name, family in FAMILIES.items()
        if architecture in {family.architecture, *(layout.architecture for layout in family.layouts)}
    }
    if name not in fitting:
        raise ValueError(f"layout is {name!r}; a {architecture} model can be written as {', '.join(fitting)}")
    family = FAMILIES[name]
    if not family.layouts:
        return None
    entry = diffusion_entry(config, family)
    if entry["shift"] != family.shift or entry["attention"][0] not in family.attention:
        raise ValueError(
            f"layout {name!r} means attention {' or '.join(family.attention)} and shift={family.shift}; this "
            f"model has {entry['attention'][0]} and shift={entry['shift']}"
        )
    layout = next(
        layout for layout in family.layouts if (layout.architecture or family.architecture) == architecture
    )
    ends = token_ids(config.eos_token_id)
    stock = {**config.to_diff_dict(), "eos_token_id": ends[0] if ends else None}
    entries = layout.own_entries({key: stock[key] for key in stock.keys() - _NOT_OF_THE_MODEL})
    entries = {"model_type": name, "architectures": [layout.model_class], **dict(sorted(entries.items()))}
    read_back = read_config(entries, family)[0]
    again, expected = read_back.to_dict(), config.to_dict()
    written_otherwise = {"eos_token_id", *layout.needs}  # a use_cache that the line's own code takes
    kept = type(config)().to_dict().keys() - _NOT_OF_THE_MODEL - written_otherwise
    if lost := sorted(key for key in kept if again[key] != expected[key]):
        raise ValueError(
            f"layout {name!r} cannot express {', '.join(f'{key}={expected[key]}' for key in lost)}"
        )
    return entries, layout


def check_tokens(ids: object, name: str, vocab_size: object, several: bool = False) -> None:
    """Refuse a value that is no token id, or no list of them if several are allowed."""
    given = ids if several and isinstance(ids, list) else [] if ids is None else [ids]
    for token in given:
        if type(token) is not int or token < 0 or (type(vocab_size) is int and token >= vocab_size):
            allowed = (
                f"an integer from 0 to {vocab_size - 1}" if type(vocab_size) is int else "an integer >= 0"
            )
            raise ValueError(f"{name} is {ids!r:.80}; it must be {allowed}{', or a list of them' * several}")


def _layout(entries: dict, family: Family) -> Layout | None:
    """Return the layout that the entries are written in."""
    if not family.layouts:
        return None
    layout = next((layout for layout in family.layouts if not layout.misfits(entries)), None)
    if layout is None:
        closest = min(family.layouts, key=lambda layout: len(layout.misfits(entries)))
        misfits = "; ".join(closest.misfits(entries))
        raise ValueError(f"transformers' {family.architecture} does not run this config.json: {misfits}")
    return layout


def _of_the_model(entries: Mapping, dropped: set[str]) -> dict:
    """Return `entries` without the dropped ones and without those about software in nested configs."""
    return {
        key: _of_the_model(value, _SOFTWARE) if isinstance(value, dict) else value
        for key, value in entries.items()
        if key not in dropped
    }


# ---- checks ------------------------------------------------------------------------------------------------
def _check_entries(entries: Mapping) -> None:
    """Refuse what config classes do not check: layer counts, which they list, rotary bases, epsilons."""
    for key, value in entries.items():
        if isinstance(value, dict):
            _check_entries(value)
        elif key.endswith("rope_theta"):
            for base in value if isinstance(value, list) else [value]:
                if base is not None:
                    _check_number(key, base)
        elif key.endswith(("_eps", "epsilon")) and value is not None:
            _check_number(key, value)
        elif _LAYER_COUNT.fullmatch(key) and isinstance(value, int | float) and not value <= _MOST_LAYERS:
            raise ValueError(
                f"config.json: {key} is {value!r:.80}; no model has more than {_MOST_LAYERS} layers"
            )


def _check(config) -> None:
    """Refuse sizes, windows, token ids and rotary settings that no model can have."""
    text = config.get_text_config()
    for name in _SIZES:
        size = _setting(text, name)
        for value in size if isinstance(size, list | tuple) else [size]:
            if value is not None and (type(value) is not int or not 1 <= value < 2**31):
                raise ValueError(
                    f"config.json: {name} is {value!r:.80}; it must be an integer from 1 to {2**31 - 1}"
                )
    for name, least in _LEAST.items():
        size = _setting(text, name)
        if size is not None and (type(size) is not int or size < least):
            raise ValueError(
                f"config.json: {name} is {size!r:.80}; it must be an integer >= {least}, or null"
            )
    heads, shared = _setting(text, "num_attention_heads"), _setting(text, "num_key_value_heads")
    if type(heads) is int and type(shared) is int and heads % shared:
        raise ValueError(
            f"config.json: num_attention_heads is {heads}, not a multiple of num_key_value_heads, {shared}"
        )
    for part in {id(part): part for part in (config, text)}.values():
        for name in _TOKENS:
            ids, several = _setting(part, name), name in ("bos_token_id", "eos_token_id")
            if not several or ids != getattr(type(part), name, None):  # which may be of another vocabulary
                check_tokens(ids, f"config.json: {name}", _setting(text, "vocab_size"), several)
        for name, value in _numbers(getattr(part, "rope_parameters", None) or {}):
            _check_number(name, value)


def _check_number(name: str, value: object) -> None:
    """Refuse a value that is no finite number, or that must be positive and is not."""
    positive = name.endswith("rope_theta") or name == "factor"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"config.json: {name} is {value!r:.80}; it must be a number")
    if positive and value <= 0:
        raise ValueError(f"config.json: {name} is {value!r}; it must be > 0")


def _setting(config, name: str):
    """Return a setting; None if the config does not set it, or sets it for each kind of layer."""
    if isinstance(getattr(type(config), name, None), property):
        return None
    try:
        return getattr(config, name, None)
    except Exception:  # transformers refuses to give one value for all layers
        return None


def _numbers(rope: object) -> Iterator[tuple[str, object]]:
    """Yield the numbers among the rotary settings of all kinds of layers."""
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: rope_parameters is {rope!r:.80}; it must hold entries by name")
    for name, value in rope.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, list | tuple):
            yield from ((name, part) for part in value)
        elif name == "rope_theta" or not (value is None or isinstance(value, bool | str)):
            yield name, value
