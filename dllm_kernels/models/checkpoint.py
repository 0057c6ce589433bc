"""`dk.load` and `dk.save`: diffusion models and their tokenizers, from and to folders and the hub."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from dllm_kernels.models import merged_projections
from dllm_kernels.models.adapters import base_name, is_adapter, merge_adapter_into, own_tokenizer
from dllm_kernels.models.attention import see_as_trained, sees_whole_rows
from dllm_kernels.models.checkpoint_files import ADAPTER, read_json, stored_tensors, write_json
from dllm_kernels.models.checkpoint_layouts import Layout
from dllm_kernels.models.config_json import check_tokens, own_entries, read_config
from dllm_kernels.models.empty_models import empty_model, model_class, skeleton
from dllm_kernels.models.families import Family, family_of, token_ids
from dllm_kernels.models.fused_layers import fuse_layers
from dllm_kernels.models.gated_layers import gate_layers
from dllm_kernels.models.grouped_layers import group_layers
from dllm_kernels.models.incoming_layers import layers_to_store, receivers
from dllm_kernels.models.nested_patch import nested_patch
from dllm_kernels.models.quantization_config import QuantizationConfig, expect_quantized
from dllm_kernels.models.safetensors_io import fill_weights, own_storages, plan_weights, write_weights
from dllm_kernels.models.savable import refuse_unsavable
from dllm_kernels.models.saved_weights import quantization_of, saved_state
from dllm_kernels.models.staging import CONFIG, interrupted_save, recover, staged
from dllm_kernels.models.stored_weights import (
    KINDS,
    KINDS_ON,
    SCALED,
    StoredLinear,
    check_stored,
    store_tied_head,
    store_weights,
)
from dllm_kernels.models.tokenizer_files import FILES, read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = {"tiny-python": Path(__file__).parents[1] / "assets" / "tiny-python"}

GENERATION = "generation_config.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MODEL_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|" + re.escape(GENERATION)
)
_ALL_FILES = re.compile("|".join((_MODEL_FILES.pattern, *map(re.escape, FILES))))
_SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)
# Parts of encoders that files of masked-LM models hold, and those models do not or compute.
_UNREAD = ("pooler.", "embeddings.position_ids")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load(
    name: str | Path,
    device=None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    merge_projections: bool = False,
    base: str | Path | None = None,
    weights: str | None = None,
    fused: bool | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Return (model, tokenizer) of a checkpoint; the tokenizer is None if the checkpoint has none.

    name: "tiny-python", a folder with config.json and safetensors weights, or a hub name "owner/name". A
    folder with a peft adapter gives its base model with the adapter merged in.
    device: None takes the GPU if there is one. dtype: None is float32 on CPU, bfloat16 elsewhere.
    attention: "block_causal" | "bidirectional" for checkpoints trained for both; None is their first.
    merge_projections: queries, keys and values as one product without gradients, gate and up as another
    (`models.merged_projections`); a model whose projections are fused already stays as it is.
    base: the base model of an adapter, in place of the one that its adapter_config.json names.
    weights: "float32" | "bfloat16" | "int8", and "fp8" (e4m3) on CUDA: linear layers store their weights so,
    read once for few rows (`models.stored_weights`); the vocabulary projection only in 8 bits. One that is
    tied to the embedding then has an 8-bit copy, one byte a weight more, and the embedding stays as it is.
    How the products round: `skinny_linear`. None: as the checkpoint has them, int8 and fp8 ones stored as
    they are and others in stock layers.
    fused: norms, rotations and gated MLPs are single operators (`models.fused_layers`), on devices that have
    them. None: where linear layers are stored.
    The model is a stock transformers model in eval mode. Called directly it sees what it was trained to see
    (`attention.see_as_trained`). A weight that is missing, left over or of the wrong shape is an error. No
    code of the checkpoint is run, and its weights are never in memory twice. Threads build models one
    at a time; modules that other threads make meanwhile may stay uninitialised.
    """
    folder = checkpoint_folder(name)
    device, dtype = _placement(device, dtype)
    if weights is not None:
        check_stored(weights, device)
    model, tokenizer = read_checkpoint(
        folder, device, dtype, attention, merge_projections, base=base, weights=weights
    )
    if weights in SCALED:
        with _named(folder):
            store_tied_head(model, weights)
    stored = any(isinstance(module, StoredLinear) for module in model.modules())
    if fused or (fused is None and stored):
        fuse_layers(model)
    if stored:
        gate_layers(model)
        group_layers(model)
    see_as_trained(model)
    found = str(name) not in EMBEDDED and Path(name).expanduser().is_dir()
    model.name_or_path = str(folder.resolve() if found else name)  # which peft records as the base
    return model, tokenizer


def read_checkpoint(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None = None,
    merge_projections: bool = False,
    trained: bool = True,
    base: str | Path | None = None,
    weights: str | None = None,
):
    """Return (model, tokenizer) of a folder, the model in eval mode and with its own mask.

    trained: False also reads checkpoints that were not trained for diffusion; their config's "diffusion"
    entry then lists no attention. weights: as in `load`, or "stock": stock layers, 8-bit ones dequantized.
    """
    if merge_projections and weights is not None:
        raise ValueError(f"merge_projections has no meaning with weights={weights!r}")
    if is_adapter(folder):
        model, tokenizer = _read_adapted(folder, base, device, dtype, attention, trained)
        if merge_projections:
            merged_projections.merge_projections(model)
        if weights in KINDS:
            store_weights(model, weights)
        return model, tokenizer
    if base is not None:
        raise ValueError(f"base is {str(base)!r}, but {folder} is a whole model and no adapter")
    version = _version(folder)
    with _named(folder):
        entries, family, config, layout = _read_config(folder)
        if trained:
            _pick_attention(config, entries["model_type"], attention)
    tokenizer = read_tokenizer(folder, config, family.tokenizer)
    config.mask_token_id = _mask_token(folder, config, tokenizer)
    config.eos_token_id = _end_tokens(folder, config, tokenizer, family)
    with _named(folder):
        stored = stored_tensors(folder)
        kind = model_class(config, family.masked_lm, entries.get("architectures"))
        expected = skeleton(kind, config, dtype, sum(math.prod(tensor.shape) for tensor in stored.values()))
        sizes, file_kind = _quantized_layers(entries, expected, layout)
        if sizes and weights != "stock":
            _refuse_quantized(file_kind, weights, device, merge_projections)
        layers = layers_to_store(expected, sizes, weights, file_kind)
        expect_quantized(expected, sizes, file_kind)
        unread = [*family.other_heads]
        if family.masked_lm:
            unread += ("cls.seq_relationship.", *(f"{expected.base_model_prefix}.{part}" for part in _UNREAD))
        plan = plan_weights(expected, stored, layout, unread)
        without = [name for name, storing in layers.items() if storing.kind is not None]
        model = empty_model(kind, config, device, dtype, without)
        _complete(model.config, config)
        if merge_projections:
            merged_projections.merge_projections(model)
        fill_weights(model, plan, stored, receivers(model, layers, dtype, device))
    if _version(folder) != version:
        raise ValueError(f"{folder} was replaced while it was read; load it again")
    return model.eval(), tokenizer


def save(
    model, tokenizer, folder: str | Path, layout: str | None = None, max_shard_size: str = "5GB"
) -> None:
    """Write a model, and a tokenizer if there is one, as a checkpoint that `dk.load` reads.

    layout: None writes a stock transformers checkpoint; the name of a family (a model_type in `FAMILIES`) its
    config.json and weight names, for the family's own code. Everything is written beside `folder` and moved
    when it is complete: a checkpoint that was there is replaced, other files stay.
    """
    from transformers.utils import logging

    refuse_unsavable(model)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; give one of transformers, or None")
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder is a {type(folder).__name__}; it must be a str or a Path")
    own = None if layout is None else own_entries(model.config, layout)
    if folder == "":
        raise ValueError("folder is empty; give the path of a folder ('.' is the current one)")
    _check_shard_size(max_shard_size)
    folder = Path(folder).expanduser().resolve()
    _mask_token(folder, model.config, tokenizer)
    stale = _MODEL_FILES if tokenizer is None else _ALL_FILES
    with staged(folder, stale) as beside, _quiet(logging), _named_disk(folder):
        quantization = quantization_of(model, None if own is None else own[1])
        if own is None:
            weights = own_storages(saved_state(model))
            with nested_patch(("saved", id(model)), partial(_saved_by_any_process, model)):
                model.save_pretrained(beside, state_dict=weights, max_shard_size=max_shard_size)
            more: dict[str, object] = {}
            if sees_whole_rows(model):  # for plain transformers, if the model was not loaded but marked
                more["is_causal"] = False
            if quantization is not None:
                more["quantization_config"] = quantization.entries()
            if more:
                write_json(beside / CONFIG, {**read_json(beside / CONFIG), **more})
        else:
            entries, written = own
            entries["torch_dtype"] = str(model.dtype).removeprefix("torch.")
            if quantization is not None:
                entries["quantization_config"] = quantization.entries()
            write_json(beside / CONFIG, entries)
            special = {key: entries.get(key) for key in ("bos_token_id", "pad_token_id", "mask_token_id")}
            ends = list(token_ids(model.config.eos_token_id)) or None
            write_json(beside / GENERATION, {**special, "eos_token_id": ends})
            write_weights(saved_state(model), beside, written, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


@contextmanager
def _saved_by_any_process(model) -> Iterator[None]:
    """Let save_pretrained write in every process: under torch.distributed only rank 0 would."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def load_tokenizer(name: str | Path):
    """Return the tokenizer that `load` gives, without reading weights; None if there is none."""
    folder = checkpoint_folder(name)
    if is_adapter(folder):
        found = own_tokenizer(folder, None, None)
        return load_tokenizer(base_name(folder)) if found is None else found
    with _named(folder):
        _, family, config, _ = _read_config(folder)
    return read_tokenizer(folder, config, family.tokenizer)


def attentions(name: str | Path) -> list[str]:
    """Return the kinds of attention that a checkpoint was trained for, its own choice first."""
    folder = checkpoint_folder(name)
    if is_adapter(folder):
        return attentions(base_name(folder))
    with _named(folder):
        return [*_read_config(folder)[2].diffusion["attention"]]


def _read_config(folder: Path):
    """Return config.json's entries, their family, the stock config and the layout."""
    entries = read_json(folder / CONFIG)
    family = family_of(entries.get("model_type"), entries.get("architectures"))
    return entries, family, *read_config(entries, family)


def _quantized_layers(
    entries: dict, skeleton: nn.Module, layout: Layout | None
) -> tuple[dict[str, int | None], str]:
    """Return the layers that config.json says are in 8 bits, by stock name -> inputs per scale (None: all),
    and whether these are "int8" or "fp8"."""
    if not entries.get("quantization_config"):
        return {}, "int8"
    names = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    written = {name: name if layout is None else layout.own_module_name(name) for name in names}
    config = QuantizationConfig.of_entries(entries["quantization_config"])
    return config.sizes(written), config.kind


def _refuse_quantized(kind: str, weights: str | None, device: torch.device, merge_projections: bool) -> None:
    allowed = KINDS_ON.get(device.type, ())
    if weights is None and kind not in allowed:
        raise ValueError(
            f"its weights are {kind}, which are not for models on {device}; give weights=, one of: "
            f"{', '.join(allowed)}"
        )
    if merge_projections:
        raise ValueError(f"merge_projections has no meaning with {kind} weights")


def _read_adapted(
    folder: Path,
    base: str | Path | None,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
    trained: bool,
):
    """Return (model, tokenizer) of an adapter's base model with the adapter merged in."""
    name = base_name(folder, base)
    try:
        of_base = checkpoint_folder(name)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder} is an adapter of {name!r}, which is not found ({error}); give base="
        ) from error
    if of_base.resolve() == folder.resolve():
        raise ValueError(f"{folder} is an adapter that names itself as its base model; give base=")
    model, tokenizer = read_checkpoint(of_base, device, dtype, attention, trained=trained, weights="stock")
    merge_adapter_into(model, folder)
    tokenizer = own_tokenizer(folder, model.config, tokenizer)
    model.config.mask_token_id = _mask_token(folder, model.config, tokenizer)
    return model, tokenizer


def _placement(device, dtype) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of the weights."""
    try:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        place = torch.device(device)
        if place.type != "meta":
            torch.empty(0, device=place)
    except Exception as error:  # any error of a missing backend
        raise ValueError(f"device is {device!r}: {error}") from None
    if isinstance(device, bool) or place.type == "meta":
        raise ValueError(f"device is {place}, which cannot hold weights")
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in _DTYPES:
        raise TypeError(
            f"dtype is {dtype!r}; give a floating point torch.dtype: {', '.join(map(str, _DTYPES))}"
        )
    return place, dtype


# ---- what the files say together ---------------------------------------------------------------------------
def _pick_attention(config, model_type: str, attention: str | None) -> None:
    """Put the requested kind of attention first."""
    kinds = config.diffusion["attention"]
    if not kinds:
        raise ValueError(
            f'config.json has no "diffusion" entry, so nothing says that this {model_type} model was trained '
            "for diffusion"
        )
    if attention is None:
        return
    if attention not in kinds:
        raise ValueError(f"attention is {attention!r}; this checkpoint was trained for {', '.join(kinds)}")
    config.diffusion["attention"] = [attention, *(kind for kind in kinds if kind != attention)]


def _mask_token(folder: Path, config, tokenizer) -> int | None:
    """Return the config's mask token, else the tokenizer's; refuse two different ones."""
    mask, own = getattr(config, "mask_token_id", None), getattr(tokenizer, "mask_token_id", None)
    if None not in (mask, own) and mask != own:
        raise ValueError(f"{folder}: mask_token_id is {mask} in config.json and {own} in the tokenizer")
    check_tokens(own, f"{folder}: mask_token_id of the tokenizer", _text(config, "vocab_size"))
    return own if mask is None else mask


def _end_tokens(folder: Path, config, tokenizer, family: Family) -> int | list[int] | None:
    """Return all end tokens: the config's, generation_config.json's and the family's."""
    generation = folder / GENERATION
    named = read_json(generation).get("eos_token_id") if generation.is_file() else None
    own = _text(config, "eos_token_id")
    if named != own:
        check_tokens(named, f"{generation}: eos_token_id", _text(config, "vocab_size"), several=True)
    ends = [*token_ids(own), *token_ids(named)]
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        ends += [vocabulary[token] for token in family.end_tokens if token in vocabulary]
    ends = list(dict.fromkeys(ends))
    return ends if len(ends) > 1 else next(iter(ends), None)


def _complete(config, whole) -> None:
    """Copy the diffusion settings of a multimodal config to the config of its text model."""
    if config is not whole:
        config.diffusion, config.mask_token_id = whole.diffusion, whole.mask_token_id
        config.eos_token_id = whole.eos_token_id


def _text(config, name: str):
    """Return a setting of the language model, which is a part of multimodal ones."""
    own = getattr(config, name, None)
    return getattr(config.get_text_config(), name, None) if own is None else own


# ---- files -------------------------------------------------------------------------------------------------
@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Add the folder to errors about the contents of its files."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{folder}: {CONFIG} is nested too deeply") from None
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"{folder}: {error}") from error.__cause__


@contextmanager
def _named_disk(folder: Path) -> Iterator[None]:
    """Add the folder to the error of safetensors about a file that it could not write."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from None


def _version(folder: Path) -> tuple[int, int]:
    """Return a value that changes when a checkpoint is replaced: config.json goes first and comes last."""
    try:
        found = (folder / CONFIG).stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def _check_shard_size(size: int | str) -> None:
    whole = type(size) is int and size >= 1
    if not whole and not (isinstance(size, str) and _SHARD_SIZE.fullmatch(size)):
        raise ValueError(f'max_shard_size is {size!r}; give a number of bytes, or a str like "5GB"')


@contextmanager
def _quiet(logging):
    """Silence the progress bars of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def checkpoint_folder(name: str | Path) -> Path:
    """Return the folder that holds a checkpoint, fetched from the hub when the name is a hub name."""
    known = f'known names: {", ".join(EMBEDDED)}; else a folder with config.json, or a hub name "owner/name"'
    if not isinstance(name, str | Path):
        raise TypeError(f"name is a {type(name).__name__}; {known}")
    folder = EMBEDDED.get(str(name), Path(name).expanduser())
    if (folder / CONFIG).is_file() or (folder / ADAPTER).is_file():
        return folder
    recover(folder)
    if (folder / CONFIG).is_file():
        return folder
    if (replaced := interrupted_save(folder)) is not None:
        raise ValueError(
            f"{folder} holds no {CONFIG}: a dk.save to it was interrupted while replacing files. The old "
            f"ones are in {replaced}; make the folder writable and load again, or save again"
        )
    if folder.suffix == ".gguf" and folder.is_file():
        raise ValueError(
            f"{folder} is a GGUF file; dllm convert {folder.name} FOLDER makes a checkpoint of it, and with "
            "--weights int8 keeps the bytes of q8_0 weights"
        )
    if str(name) in EMBEDDED or folder.exists():
        raise FileNotFoundError(f"{folder} holds no config.json; {known}")
    owner, _, repository = str(name).partition("/")
    if isinstance(name, Path) or not owner or not repository or "/" in repository:
        raise ValueError(f"there is no model named {str(name)!r}; {known}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # any error of the hub client: offline, no such repository, no access
        raise ValueError(
            f"{str(name)!r} is not a folder here, and the hub did not return it ({type(error).__name__}); "
            f"{known}"
        ) from error
