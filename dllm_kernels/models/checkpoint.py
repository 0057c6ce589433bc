"""`dk.load` and `dk.save`: diffusion models and their tokenizers, from and to folders and the hub."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dllm_kernels.models import merged_projections
from dllm_kernels.models.families import FAMILIES, Family, diffusion_entry, family_of, token_ids
from dllm_kernels.models.weights import own_storages, read_json, read_weights, write_json, write_weights

EMBEDDED = {"tiny-python": Path(__file__).parents[1] / "assets" / "tiny-python"}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load(
    name: str | Path,
    device=None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    merge_projections: bool = False,
):
    """(model, tokenizer) of a checkpoint; the tokenizer is None when the checkpoint has none.

    name: "tiny-python", a folder with config.json and safetensors weights, or a hub name "owner/name".
    device: None takes the GPU where there is one. dtype: None is float32 on CPU, bfloat16 elsewhere.
    attention: "block_causal" | "bidirectional" for checkpoints trained for both; None is their first.
    merge_projections: queries, keys and values as one product without gradients, gate and up as another
    (`models.merged_projections`); a model whose projections are fused already stays as it is.
    The model is a stock transformers model in eval mode; a weight that is missing, left over or of the wrong
    shape is an error. No code of the checkpoint is run, and its weights are never in memory twice.
    """
    folder = _folder(name)
    device, dtype = _placement(device, dtype)
    entries = read_json(folder / "config.json")
    try:
        family = family_of(entries.get("model_type"))
        config, layout = _config(entries, family)
        _pick_attention(config, entries["model_type"], attention)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    try:
        tokenizer = _tokenizer(folder, config, family)
    except ValueError as error:
        raise ValueError(f"the tokenizer of {folder} cannot be read: {error}") from error
    _agree_on_mask(folder, config, tokenizer)
    config.eos_token_id = _end_tokens(folder, config, tokenizer, family)
    model = _empty_model(config, family, device, dtype)
    if merge_projections:
        merged_projections.merge_projections(model)
    read_weights(model, folder, layout, family.other_heads)
    return model.eval(), tokenizer


def save(
    model, tokenizer, folder: str | Path, layout: str | None = None, max_shard_size: str = "5GB"
) -> None:
    """Write a model, and a tokenizer if there is one, as a checkpoint that `dk.load` reads.

    layout: None writes a stock transformers checkpoint; the name of a family (a model_type in `FAMILIES`) its
    config.json and weight names, for the family's own code. Everything is written beside `folder` and moved
    when it is complete: a checkpoint that was there is replaced, other files stay.
    """
    from transformers import PreTrainedModel
    from transformers.utils import logging

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; dk.save writes transformers models")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; give one of transformers, or None")
    if not isinstance(folder, str | Path):
        raise TypeError(f"folder is a {type(folder).__name__}; it must be a str or a Path")
    entries = None if layout is None else _own_entries(model.config, layout)
    with _written_beside(Path(folder).expanduser().resolve()) as beside, _quiet(logging):
        if entries is None:
            weights = own_storages(model.state_dict())
            model.save_pretrained(beside, state_dict=weights, max_shard_size=max_shard_size)
        else:
            entries["torch_dtype"] = str(model.dtype).removeprefix("torch.")
            write_json(beside / "config.json", entries)
            special = {key: entries.get(key) for key in ("bos_token_id", "pad_token_id", "mask_token_id")}
            ends = list(token_ids(model.config.eos_token_id)) or None
            write_json(beside / "generation_config.json", {**special, "eos_token_id": ends})
            write_weights(model, beside, FAMILIES[layout].layouts[0], max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


def _placement(device, dtype) -> tuple[torch.device, torch.dtype]:
    """Where and as what the weights are loaded."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}: {error}") from None
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {device}, which cannot hold weights here")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}; give a floating point torch.dtype")
    return device, dtype


# ---- config.json -------------------------------------------------------------------------------------------
# What it says of files and software, not of the model.
_NOT_OF_THE_MODEL = {
    "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "dtype",
    "torch_dtype", "attn_implementation", "_attn_implementation",
}  # fmt: skip


def _config(entries: dict, family: Family):
    """The stock transformers config, its "diffusion" entry complete, and the layout of the weights."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    if entries.get("quantization_config"):
        raise ValueError("config.json has a quantization_config; quantized weights are not read")
    layout = None
    if family.layouts:
        layout = next((layout for layout in family.layouts if not layout.misfits(entries)), None)
        if layout is None:
            misfits = "; ".join(family.layouts[0].misfits(entries))
            raise ValueError(f"transformers' {family.architecture} does not run this config.json: {misfits}")
        entries = layout.stock_entries(entries)
    entries = {key: value for key, value in entries.items() if key not in _NOT_OF_THE_MODEL}
    try:
        config = transformers.CONFIG_MAPPING[family.architecture].from_dict(entries)
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {error}") from None
    config.diffusion = diffusion_entry(config, family)
    return config, layout


def _pick_attention(config, model_type: str, attention: str | None) -> None:
    """Put the kind of attention that was asked for first."""
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


def _own_entries(config, name: str) -> dict | None:
    """The config.json of a model in a family's own layout; None where that is the stock one.

    Read back it must give the same config: what the layout has no word for is refused.
    """
    architecture = config.model_type
    fitting = [name for name, family in FAMILIES.items() if family.architecture == architecture]
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
    layout, ends = family.layouts[0], token_ids(config.eos_token_id)
    stock = {**config.to_diff_dict(), "eos_token_id": ends[0] if ends else None}
    entries = layout.own_entries({key: stock[key] for key in stock.keys() - _NOT_OF_THE_MODEL})
    entries = {"model_type": name, "architectures": [layout.model_class], **dict(sorted(entries.items()))}
    again, expected = _config(entries, family)[0].to_dict(), config.to_dict()
    kept = type(config)().to_dict().keys() - _NOT_OF_THE_MODEL - {"eos_token_id"}
    if lost := sorted(key for key in kept if again[key] != expected[key]):
        raise ValueError(f"layout {name!r} cannot say {', '.join(f'{key}={expected[key]}' for key in lost)}")
    return entries


def _agree_on_mask(folder: Path, config, tokenizer) -> None:
    """Take the mask token from the tokenizer where the config has none; refuse two of them."""
    mask, own = getattr(config, "mask_token_id", None), getattr(tokenizer, "mask_token_id", None)
    if None not in (mask, own) and mask != own:
        raise ValueError(f"{folder}: mask_token_id is {mask} in config.json and {own} in the tokenizer")
    config.mask_token_id = own if mask is None else mask


def _end_tokens(folder: Path, config, tokenizer, family: Family) -> int | list[int] | None:
    """All that ends a text: the config's, generation_config.json's and the family's end tokens."""
    generation = folder / "generation_config.json"
    named = read_json(generation).get("eos_token_id") if generation.is_file() else None
    ends = [*token_ids(config.eos_token_id), *token_ids(named)]
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        ends += [vocabulary[token] for token in family.end_tokens if token in vocabulary]
    ends = list(dict.fromkeys(ends))
    return ends if len(ends) > 1 else next(iter(ends), None)


# ---- building a model --------------------------------------------------------------------------------------
def _empty_model(config, family: Family, device: torch.device, dtype: torch.dtype):
    """A model whose weights hold whatever was in memory."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.initialization import no_init_weights

    kind = AutoModelForMaskedLM if family.masked_lm else AutoModelForCausalLM
    with torch.device(device), no_init_weights():
        model = kind.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _tokenizer(folder: Path, config, family: Family):
    import transformers

    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    if family.tokenizer is not None:
        return getattr(transformers, family.tokenizer).from_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)


# ---- files -------------------------------------------------------------------------------------------------
@contextmanager
def _written_beside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into; what is in it moves to `folder` at the end, or vanishes."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder is {str(folder)!r}, which is a file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    beside.mkdir()
    try:
        yield beside
        files = sorted(file.relative_to(beside) for file in beside.rglob("*") if file.is_file())
        for file in files:
            (beside / file).chmod(beside.stat().st_mode & 0o666)  # safetensors leaves 0600
        if not folder.exists():
            beside.replace(folder)
            return
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            (beside / file).replace(folder / file)
        for stale in {*folder.glob("model*.safetensors*")} - {folder / file for file in files}:
            stale.unlink()
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _quiet(logging):
    """No progress bar of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _folder(name: str | Path) -> Path:
    """The folder that holds the checkpoint, fetched from the hub when the name is a hub name."""
    known = f'known names: {", ".join(EMBEDDED)}; else a folder with config.json, or a hub name "owner/name"'
    if not isinstance(name, str | Path):
        raise TypeError(f"name is a {type(name).__name__}; {known}")
    folder = EMBEDDED.get(str(name), Path(name).expanduser())
    if (folder / "config.json").is_file():
        return folder
    if str(name) in EMBEDDED or folder.exists():
        raise FileNotFoundError(f"{folder} holds no config.json; {known}")
    owner, _, repository = str(name).partition("/")
    if isinstance(name, Path) or not owner or not repository or "/" in repository:
        raise ValueError(f"no model is called {str(name)!r}; {known}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # whatever the hub client raises: offline, no such repository, no access
        raise ValueError(
            f"{str(name)!r} is no folder here, and the hub did not give it ({type(error).__name__}); {known}"
        ) from error
