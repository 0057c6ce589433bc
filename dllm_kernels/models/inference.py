"""A transformers model as sampling runs it: eval mode, our attention, no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from dllm_kernels.models.attention import enable_attention
from dllm_kernels.models.nested_patch import nested_patch


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` without dropout and gradients and on our attention within this context.

    ValueError if its attention cannot be hooked.
    """
    with enable_attention(model), torch.no_grad(), evaluating(model), naming_outputs(model):
        yield


def evaluating(model: nn.Module) -> AbstractContextManager:
    """Return a context within which `model` runs without dropout."""
    return nested_patch(("evaluating", id(model)), partial(_evaluating, model))


@contextmanager
def naming_outputs(model: PreTrainedModel) -> Iterator[None]:
    """Make forwards of `model` return outputs with names, as they read from each other, whatever
    config.return_dict says."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    with ExitStack() as named:
        for key, config in configs.items():
            named.enter_context(nested_patch(("return_dict", key), partial(_returning_dict, config)))
        yield


@contextmanager
def _returning_dict(config) -> Iterator[None]:
    before = config.return_dict
    config.return_dict = True
    try:
        yield
    finally:
        config.return_dict = before


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
