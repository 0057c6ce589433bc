"""Skip the computation of the last layer for outputs that predict nothing.

In block diffusion the clean half of a row only serves as keys and values: after the attention of the last
layer it is not read any more. So half of that layer's MLP, the largest part of a layer, need not run.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dllm_kernels.models.nested_patch import nested_patch

KEYWORD = "dllm_outputs"


def cut_last_layer(base: nn.Module, outputs: int | None) -> tuple[AbstractContextManager, dict]:
    """Return a context, and keywords for a call of `base` within it that is to give `outputs` outputs a row.

    outputs: how many, from the first on; None: all. The hidden states that `base` returns are shorter only
    if its last layer is known (`_reads_like_llama`); otherwise there are no keywords.
    """
    layers = getattr(base, "layers", None)
    if outputs is None or not isinstance(layers, nn.ModuleList) or not len(layers):
        return nullcontext(), {}
    layer = layers[-1]
    if "forward" in vars(layer) and not isinstance(layer.forward, _Cutting):
        return nullcontext(), {}  # replaced by a caller that expects all outputs
    if not _reads_like_llama(inspect.unwrap(type(layer).forward)):
        return nullcontext(), {}
    if _is_recomputed(layer) and not _CHECKPOINTS_FORWARD:
        return nullcontext(), {}  # the backward pass would find the layer whole again
    return nested_patch((KEYWORD, id(layer)), functools.partial(_cutting, layer)), {KEYWORD: outputs}


class _Cutting:
    """The forward of a layer that takes the keyword `dllm_outputs`, and without it does as before."""

    def __init__(self, layer: nn.Module):
        self._layer = weakref.ref(layer)

    def __call__(self, hidden_states: Tensor, *args, dllm_outputs: int | None = None, **kwargs) -> Tensor:
        layer = self._layer()
        if dllm_outputs is None:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        forward = functools.partial(_first_outputs, layer, dllm_outputs, **kwargs)
        if _is_recomputed(layer):
            return layer._gradient_checkpointing_func(forward, hidden_states, *args)
        return forward(hidden_states, *args)


# transformers recomputes layers around `forward`, which stands replaced here; older ones around `__call__`.
_CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)


def _is_recomputed(layer: nn.Module) -> bool:
    return getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()


def _first_outputs(layer: nn.Module, outputs: int, hidden_states: Tensor, **kwargs) -> Tensor:
    """Return the first outputs of Llama's layer, [B, outputs, hidden]."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    states = hidden_states[:, :outputs] + attended[:, :outputs]
    return states + layer.mlp(layer.post_attention_layernorm(states))


# One for each layer: torch.compile would compile again for another object in its place.
_CUTTING: weakref.WeakKeyDictionary[nn.Module, _Cutting] = weakref.WeakKeyDictionary()


@contextmanager
def _cutting(layer: nn.Module) -> Iterator[None]:
    layer.forward = _CUTTING.setdefault(layer, _Cutting(layer))
    try:
        yield
    finally:
        del layer.forward


@functools.cache
def _reads_like_llama(forward) -> bool:
    """Return whether the code of a layer's forward is that of Llama's, as for Qwen2, Qwen3 and Mistral."""
    return _code(forward) == _code(inspect.unwrap(LlamaDecoderLayer.forward))


def _code(function) -> tuple:
    code = getattr(function, "__code__", None)
    return (function,) if code is None else (code.co_code, code.co_names, code.co_varnames)
