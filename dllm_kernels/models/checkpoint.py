"""`dk.load`: a diffusion model and its tokenizer, from the embedded model, a folder or the hub."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import torch

from dllm_kernels.models.families import diffusion_entry, family_of

EMBEDDED = {"tiny-python": Path(__file__).parents[1] / "assets" / "tiny-python"}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_MISFITS = ("missing", "unexpected", "mismatched")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load(name: str | Path, device=None, dtype: torch.dtype | None = None, attention: str | None = None):
    """(model, tokenizer) of a checkpoint; the tokenizer is None when the checkpoint has none.

    name: "tiny-python", a folder with config.json and safetensors weights, or a hub name "owner/name".
    device: None takes the GPU where there is one. dtype: None is float32 on CPU, bfloat16 elsewhere.
    attention: "block_causal" | "bidirectional" for checkpoints trained for both; None is their first.
    The model is a stock transformers model in eval mode; a weight that is missing, left over or of the wrong
    shape is an error.
    """
    import transformers

    folder = _folder(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = _config(folder, attention)
    tokenizer = None
    if any((folder / file).exists() for file in _TOKENIZER_FILES):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config)
        if getattr(config, "mask_token_id", None) is None:
            config.mask_token_id = tokenizer.mask_token_id
    with _quiet(transformers.utils.logging):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    if wrong := {kind: sorted(report[f"{kind}_keys"]) for kind in _MISFITS if report[f"{kind}_keys"]}:
        raise ValueError(f"the weights of {str(name)!r} do not fit {type(model).__name__}: {wrong}")
    return model.to(device).eval(), tokenizer


@contextmanager
def _quiet(logging):
    """No progress bar and no report of misfits: an error says it all."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
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


def _config(folder: Path, attention: str | None):
    """The stock transformers config of a checkpoint, its "diffusion" entry complete and `attention` first."""
    import transformers

    entries = json.loads((folder / "config.json").read_text())
    try:
        family = family_of(entries.get("model_type"))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    config_class = transformers.CONFIG_MAPPING[family.architecture]
    renamed = {key: value for key, value in entries.items() if key not in ("model_type", "auto_map")}
    config = config_class.from_dict(renamed)
    config.diffusion = diffusion_entry(config, family)
    kinds = config.diffusion["attention"]
    if not kinds:
        raise ValueError(
            f'{folder}: config.json has no "diffusion" entry, so nothing says that this '
            f"{entries['model_type']} model was trained for diffusion"
        )
    if attention is not None:
        if attention not in kinds:
            raise ValueError(
                f"attention is {attention!r}; this checkpoint was trained for {', '.join(kinds)}"
            )
        config.diffusion["attention"] = [attention, *(kind for kind in kinds if kind != attention)]
    return config
