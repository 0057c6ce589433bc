"""Datasets for training: specification strings, pretraining rows and fine-tuning examples."""

from dllm_train.data.preprocessed import load_preprocessed_dataset
from dllm_train.data.pretraining import load_pretraining_dataset
from dllm_train.data.sft import load_sft_dataset
from dllm_train.data.sources import load_dataset_spec
from dllm_train.data.specification import Source, format_specification, parse_specification

__all__ = [
    "Source",
    "format_specification",
    "load_dataset_spec",
    "load_preprocessed_dataset",
    "load_pretraining_dataset",
    "load_sft_dataset",
    "parse_specification",
]
