"""Training of diffusion language models: noise, objectives, data, trainers, conversion and runnable recipes.

Public names are imported on first use, so that `import dllm_train` needs neither datasets nor peft.
"""

import importlib
from typing import TYPE_CHECKING

from dllm_train.convert import convert as convert

if TYPE_CHECKING:
    from dllm_train.arguments import DataArguments as DataArguments
    from dllm_train.arguments import DiffusionTrainingArguments as DiffusionTrainingArguments
    from dllm_train.arguments import ModelArguments as ModelArguments
    from dllm_train.arguments import Sampler as Sampler
    from dllm_train.arguments import get_model as get_model
    from dllm_train.arguments import get_sampler as get_sampler
    from dllm_train.arguments import get_tokenizer as get_tokenizer
    from dllm_train.collate import DiffusionCollator as DiffusionCollator
    from dllm_train.data import load_dataset_spec as load_dataset_spec
    from dllm_train.data import load_preprocessed_dataset as load_preprocessed_dataset
    from dllm_train.data import load_pretraining_dataset as load_pretraining_dataset
    from dllm_train.data import load_sft_dataset as load_sft_dataset
    from dllm_train.merge import merge_adapter as merge_adapter
    from dllm_train.noise import Noise as Noise
    from dllm_train.noise import Schedule as Schedule
    from dllm_train.noise import sample_noise as sample_noise
    from dllm_train.objectives import LossOutput as LossOutput
    from dllm_train.objectives import bd3lm_loss as bd3lm_loss
    from dllm_train.objectives import dream_loss as dream_loss
    from dllm_train.objectives import loss_normalizer as loss_normalizer
    from dllm_train.objectives import mdlm_loss as mdlm_loss
    from dllm_train.trainer import BD3LMTrainer as BD3LMTrainer
    from dllm_train.trainer import DiffusionTrainer as DiffusionTrainer
    from dllm_train.trainer import DreamTrainer as DreamTrainer
    from dllm_train.trainer import MDLMTrainer as MDLMTrainer

_MODULE_OF = {
    "DataArguments": "arguments",
    "DiffusionTrainingArguments": "arguments",
    "ModelArguments": "arguments",
    "Sampler": "arguments",
    "get_model": "arguments",
    "get_sampler": "arguments",
    "get_tokenizer": "arguments",
    "DiffusionCollator": "collate",
    "load_dataset_spec": "data",
    "load_preprocessed_dataset": "data",
    "load_pretraining_dataset": "data",
    "load_sft_dataset": "data",
    "merge_adapter": "merge",
    "Noise": "noise",
    "Schedule": "noise",
    "sample_noise": "noise",
    "LossOutput": "objectives",
    "bd3lm_loss": "objectives",
    "dream_loss": "objectives",
    "loss_normalizer": "objectives",
    "mdlm_loss": "objectives",
    "BD3LMTrainer": "trainer",
    "DiffusionTrainer": "trainer",
    "DreamTrainer": "trainer",
    "MDLMTrainer": "trainer",
}
__all__ = ["convert", *_MODULE_OF]


def __getattr__(name: str):
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
