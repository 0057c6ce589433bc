"""Run records: everything that a result depends on, written beside it, enough to repeat the run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

import torch

from dllm_kernels.models.adapters import base_name, is_adapter
from dllm_kernels.models.checkpoint import checkpoint_folder
from dllm_train.recipes.tiny_python.evaluate import environment

FORMAT = 1
_PACKAGES = ("lm_eval", "datasets", "accelerate")


def checkpoint_hash(name: str, model) -> str:
    """Return the sha256 of a checkpoint: of its weight files and config, or of a model in memory.

    name: as `dk.load` takes it. model: loaded from elsewhere; None if there must be a checkpoint.
    """
    try:
        folder = checkpoint_folder(name)
    except (ValueError, OSError):
        if model is None:
            raise
        return _state_hash(model)
    if not is_adapter(folder):
        return _folder_hash(folder)
    base = checkpoint_folder(base_name(folder))
    return hashlib.sha256(f"{_folder_hash(folder)} {_folder_hash(base)}".encode()).hexdigest()


def _folder_hash(folder: Path) -> str:
    whole = hashlib.sha256()
    configs = [path for name in ("config.json", "adapter_config.json") if (path := folder / name).exists()]
    for path in sorted([*folder.glob("*.safetensors"), *configs]):
        whole.update(path.name.encode())
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                whole.update(part)
    return whole.hexdigest()


def _state_hash(model) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def write(path: Path, record: dict) -> None:
    """Write a record as JSON, beside its place and renamed."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(record, indent=1, default=str) + "\n")
    os.replace(beside, path)


def read(path: Path) -> dict:
    """Return the record in a file; raise ValueError if it holds none."""
    try:
        record = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a run record: {error}") from None
    if not isinstance(record, dict) or record.get("dllm_record") != FORMAT:
        raise ValueError(f"{path} is not a run record of dllm eval; it holds no dllm_record: {FORMAT}")
    return record


def machine() -> dict:
    """Return machine, commit and versions that a result belongs to."""
    found = environment()
    for name in _PACKAGES:
        found["versions"][name] = importlib.metadata.version(name)
    return found | {"threads": torch.get_num_threads()}


def make(results: dict, kwargs: dict, arguments: list[str], config_file: str | None = None) -> dict:
    """Return the record of a run: lm-eval's results, the arguments of its call and of the command line.

    config_file: where `--config` took options from.
    """
    config = results["config"]
    model = config["dllm"]
    tasks = {
        name: {
            "version": results["versions"].get(name),
            "num_fewshot": results["n-shot"].get(name),
            "documents": results["n-samples"].get(name, {}).get("effective"),
            "repeats": task.get("repeats", 1),
            "generation_kwargs": task.get("generation_kwargs"),
        }
        for name, task in results["configs"].items()
    }
    return {
        "dllm_record": FORMAT,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(results["date"])),
        "arguments": arguments,
        "options_sha256": _file_hash(config_file),
        "checkpoint": model["checkpoint"],
        "tokenizer": model["tokenizer"],
        "chat_template": {"applied": bool(kwargs.get("apply_chat_template")), **model["chat_template"]},
        "system_instruction": kwargs.get("system_instruction"),
        "sampling": model["sampling"],
        "estimation": model["estimation"],
        "tasks": tasks,
        "limit": config["limit"],
        "seeds": {name: config[f"{name}_seed"] for name in ("random", "numpy", "torch", "fewshot")},
        "batch_size": config["batch_size"],
        "processes": model["processes"],
        "warm_up": "none: every request counts",
        "seconds": model["seconds"],
        "requests": model["requests"],
        "results": results["results"],
        "environment": machine(),
    }


def refuse_other_weights(earlier: dict, name: str) -> None:
    """Raise ValueError unless the checkpoint `name` has the weights of an earlier record."""
    found, recorded = checkpoint_hash(name, None), earlier["checkpoint"]
    if found != recorded["sha256"]:
        raise ValueError(
            f"the record is of {recorded['name']} with weights sha256 {recorded['sha256'][:16]}…, and {name} "
            f"now has {found[:16]}…; nothing was run"
        )


def refuse_other_options(earlier: dict, config_file: str | None) -> None:
    """Raise ValueError if the file of `--config` has changed since an earlier record."""
    if _file_hash(config_file) != earlier["options_sha256"]:
        raise ValueError(f"--config is {config_file}, which has changed since the record; nothing was run")


def _file_hash(path: str | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def differences(earlier: dict, now: dict) -> list[str]:
    """Return one line for each score that differs from an earlier record, and the possible reason."""
    lines = []
    for task, scores in earlier["results"].items():
        for name, score in scores.items():
            found = now["results"].get(task, {}).get(name)
            if found != score and not name.startswith("tokens_per_second"):
                lines.append(f"{task} {name.split(',')[0]}: {score} in the record, {found} now")
    if lines:
        before, after = earlier["environment"], now["environment"]
        versions = {**before["versions"], "machine": before["machine"], "commit": before["commit"]}
        current = {**after["versions"], "machine": after["machine"], "commit": after["commit"]}
        lines += [
            f"{name}: {value} in the record, {current.get(name)} now"
            for name, value in versions.items()
            if current.get(name) != value
        ]
    return lines
