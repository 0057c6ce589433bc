"""Samplers of other projects, run from a checkout that the user names with --peer NAME=DIR.

Nothing of theirs is stored here: an adapter imports their module from the folder and calls it as users do.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor


def loops(name: str, folder: str, kind: str) -> list[Callable]:
    """Functions (model, new_tokens, block_size, mask_id, prompt) → ids; none where there is no such loop.

    kind: "mdlm", bidirectional, or "bd3lm", block-causal.
    """
    if name not in ADAPTERS:
        raise ValueError(f"--peer {name}=...: known are {', '.join(ADAPTERS)}")
    if not Path(folder).is_dir():
        raise ValueError(f"--peer {name}={folder}: there is no such folder")
    return ADAPTERS[name](Path(folder), kind)


def _llada(folder: Path, kind: str) -> list[Callable]:
    """LLaDA, generate.py."""
    if kind != "mdlm":
        return []
    spec = importlib.util.spec_from_file_location("llada_generate", folder / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(model, new_tokens: int, block_size: int, mask_id: int, prompt: list[int]) -> Tensor:
        return module.generate(
            model,
            torch.tensor([prompt]),
            steps=new_tokens,
            gen_length=new_tokens,
            block_length=min(block_size, new_tokens),
            mask_id=mask_id,
        )

    return [run]


def _dllm(folder: Path, kind: str) -> list[Callable]:
    """dLLM, MDLMSampler and BD3LMSampler."""
    for package in ("dllm", "dllm.core"):  # their own __init__ imports every trainer and pipeline
        module = sys.modules.setdefault(package, ModuleType(package))
        module.__path__ = [str(folder.joinpath(*package.split(".")))]
    samplers = importlib.import_module("dllm.core.samplers")
    sampler, config = {
        "mdlm": (samplers.MDLMSampler, samplers.MDLMSamplerConfig),
        "bd3lm": (samplers.BD3LMSampler, samplers.BD3LMSamplerConfig),
    }[kind]

    def run(model, new_tokens: int, block_size: int, mask_id: int, prompt: list[int]) -> Tensor:
        # No end token: random models would stop at any id.
        tokens = SimpleNamespace(mask_token_id=mask_id, bos_token_id=-1, eos_token_id=-1, pad_token_id=-1)
        options = config(max_new_tokens=new_tokens, block_size=min(block_size, new_tokens), steps=new_tokens)
        return sampler(model=model, tokenizer=tokens).sample([torch.tensor(prompt)], options)

    return [run]


ADAPTERS = {"llada": _llada, "dllm": _dllm}
