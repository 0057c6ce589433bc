"""Models that transformers reads and dk.load does not: pickled weights and GGUF files, checked alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dllm_kernels.models.checkpoint_files import INDEX, WEIGHTS, read_json
from dllm_kernels.models.empty_models import model_class
from dllm_kernels.models.families import diffusion_entry, family_of, token_ids
from dllm_kernels.models.saved_weights import saved_state
from dllm_kernels.models.staging import CONFIG
from dllm_kernels.models.stored_weights import store_weights
from dllm_kernels.models.tokenizer_files import read_tokenizer
from dllm_train.conversion.gguf_tensors import refuse_left_over_tensors
from dllm_train.conversion.q8_0 import has_q8_0, read_q8_0

_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_pickled(folder: Path, dtype: torch.dtype | None, with_tokenizer: bool):
    """Return (model, tokenizer) of a folder with pytorch_model.bin; dtype: None keeps the config's."""
    if not any((folder / name).is_file() for name in _PICKLED):
        raise FileNotFoundError(f"{folder} holds none of {WEIGHTS}, {INDEX}, {', '.join(_PICKLED)}")
    entries = read_json(folder / CONFIG)
    family = family_of(entries.get("model_type"), entries.get("architectures"))
    if family.layouts and family.architecture != entries["model_type"]:
        raise ValueError(
            f"{folder} holds {_PICKLED[0]}; {entries['model_type']} is read from safetensors alone"
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind = model_class(config, family.masked_lm, entries.get("architectures"))
    model = _read(kind, folder, dtype or "auto", family.other_heads)
    return model, read_tokenizer(folder, config, family.tokenizer) if with_tokenizer else None


def read_gguf(file: Path, dtype: torch.dtype, with_tokenizer: bool, weights: str | None = None):
    """Return (model, tokenizer) of a GGUF file, its weights dequantized.

    weights: how linear layers store theirs, as in `convert`; "int8" keeps the bytes of q8_0 layers.
    """
    if not file.is_file():
        raise FileNotFoundError(f"source is {file}, and there is no such file")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ImportError("reading GGUF files needs the package gguf: pip install gguf") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if weights == "int8" and _opened(file, has_q8_0):
        model = _opened(file, lambda file: read_q8_0(file, dtype))
        refuse_left_over_tensors(file, model.config, saved_state(model))
        model = _marked(model, model.generation_config)
    else:
        model = _read(AutoModelForCausalLM, file.parent, dtype, gguf_file=file.name)
        refuse_left_over_tensors(file, model.config, model.state_dict())
        if weights is not None:
            store_weights(model, weights)
    if not with_tokenizer:
        return model, None
    try:
        return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # any error of transformers about unknown tokenizers
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the tokenizer of {file} cannot be read ({reason}); give tokenizer=") from error


def _opened(file: Path, read):
    """Return read(file); an error of a broken file names it."""
    try:
        return read(file)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # any error of transformers and gguf about a broken file
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{file} cannot be read ({kind}{error})") from error


def _read(kind, folder: Path, dtype, unread: tuple[str, ...] = (), **options):
    """Return a model as transformers reads it; weights that do not fit are a ValueError."""
    place = folder / options.get("gguf_file", "")
    try:
        read, report = kind.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # any error of transformers and its readers about a broken file
        raise ValueError(f"{place} cannot be read ({type(error).__name__}: {error})") from error
    _refuse_misfits(place, report, unread)
    return _marked(_plain(read), getattr(read, "generation_config", None))


def _marked(model, generation):
    """Return `model` in eval mode with a complete "diffusion" entry and all end tokens in its config."""
    model.config.diffusion = diffusion_entry(model.config, family_of(model.config.model_type))
    ends = (*token_ids(model.config.eos_token_id), *token_ids(getattr(generation, "eos_token_id", None)))
    ends = list(dict.fromkeys(ends))
    model.config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    return model.eval()


def _refuse_misfits(place: Path, report: Mapping, unread: tuple[str, ...]) -> None:
    kinds = {name: report.get(f"{name}_keys", ()) for name in ("missing", "unexpected", "mismatched")}
    kinds["unexpected"] = [name for name in kinds["unexpected"] if not name.startswith(unread or ("\0",))]
    if wrong := {kind: sorted(map(str, names))[:8] for kind, names in kinds.items() if names}:
        described = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items())
        raise ValueError(f"the weights of {place} do not fit: {described}")


def _plain(read):
    """Return a model of the same class without what its file left on it, such as quantization marks."""
    config = read.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    for name, buffer in read.named_buffers():  # those that no file holds
        model.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], buffer, persistent=name in read.state_dict()
        )
    model.tie_weights()
    return model
