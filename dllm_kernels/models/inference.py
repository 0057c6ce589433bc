"""A transformers model as sampling runs it: eval mode, our attention, no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel

from dllm_kernels.models.attention import enable_attention
from dllm_kernels.models.nested_patch import nested_patch


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` without dropout and gradients and on our attention within this context.

    ValueError if its attention cannot be hooked.
    """
    quiet = nested_patch(("evaluating", id(model)), partial(_evaluating, model))
    with enable_attention(model), torch.no_grad(), quiet:
        yield


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
