"""Files of a checkpoint: JSON, and safetensors files as a set of named tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
ADAPTER = "adapter_config.json"
_READ_AT_ONCE = 2**26  # bytes

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint as the header of its file describes it. dtype: else the file's name of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class OpenFiles:
    """Safetensors files that are read in turn.

    Pages that were read stay in the memory of the process as long as the file is open, so that it is opened
    again after every 64 MiB.
    """

    def __init__(self):
        self._open: dict[Path, safe_open] = {}
        self._read: dict[Path, int] = {}

    def read(self, name: str, file: Path) -> Tensor:
        """Return a tensor mapped from the file; its pages are released with the tensor and the file."""
        if self._read.get(file, 0) >= _READ_AT_ONCE:
            self.close(file)
        if file not in self._open:
            self._open[file], self._read[file] = _opened(file), 0
        tensor = self._open[file].get_tensor(name)
        self._read[file] += tensor.nbytes
        return tensor

    def close(self, file: Path) -> None:
        self._open.pop(file, None)
        self._read.pop(file, None)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return all tensors of a checkpoint by name, from the headers of its files."""
    found: dict[str, Stored] = {}
    for path, indexed in _files(folder).items():
        file = _opened(path)
        names = set(file.keys())
        if lacking := sorted(indexed - names):
            raise ValueError(f"{path} lacks {lacking[0]}, which {INDEX} says it holds")
        if twice := sorted(names & found.keys()):
            raise ValueError(f"{path} holds {twice[0]}, and so does {found[twice[0]].file.name}")
        for name in sorted(names):
            part = file.get_slice(name)
            dtype = part.get_dtype()
            found[name] = Stored(path, tuple(part.get_shape()), _DTYPES.get(dtype, dtype))
    return found


def read_json(path: Path) -> dict:
    """Return the entries of a checkpoint's JSON file."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}, not entries by name")
    return entries


def _number(entries: dict) -> dict | float:
    """Return infinity and NaN, which JSON cannot express, from the form in which transformers writes them."""
    return float(entries["__float__"]) if entries.keys() == {"__float__"} else entries


def write_json(path: Path, entries: dict) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None


def _files(folder: Path) -> dict[Path, set[str]]:
    """Return the files that hold the weights, each with its names in the index (none: no index)."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {WEIGHTS} and no {INDEX}; other formats are not read "
                "(transformers' from_pretrained and save_pretrained turn pytorch_model.bin into it)"
            )
        return {folder / WEIGHTS: set()}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has weight_map {places!r:.80}; it must name the file of every weight")
    there = {path.name for path in folder.iterdir() if path.is_file()}
    files: dict[Path, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str):
            raise ValueError(f"{index} has {file!r:.80} as the file of {name}; it must be a file name")
        if file not in there:
            raise FileNotFoundError(f"{index} names {file!r:.80}, which is not in the folder")
        files.setdefault(folder / file, set()).add(name)
    return files
