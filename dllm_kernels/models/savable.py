"""Refuse to save models that hold more than the weights of their class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dllm_kernels.models.empty_models import skeleton
from dllm_kernels.models.quantization_config import expect_quantized
from dllm_kernels.models.safetensors_io import misfit
from dllm_kernels.models.saved_weights import copied_heads, quantized_kind, quantized_layers, saved_state

# Wrappers by the name of their class -> what to save instead.
_WRAPPERS = {
    "OptimizedModule": "compiled; save model._orig_mod",
    "DataParallel": "wrapped; save model.module",
    "DistributedDataParallel": "wrapped; save model.module",
    "FullyShardedDataParallel": "sharded; save a model that holds the gathered state_dict",
    "DeepSpeedEngine": "wrapped; save model.module",
}
# Parts of weights' names -> what added them and how to remove it.
_ADDITIONS = {
    "lora_": "an adapter; save the model that peft_model.merge_and_unload() returns",
    "base_layer": "an adapter; save the model that peft_model.merge_and_unload() returns",
    "modules_to_save": "an adapter; save the model that peft_model.merge_and_unload() returns",
    "parametrizations": "a parametrization; call torch.nn.utils.parametrize.remove_parametrizations first",
    "_fsdp_wrapped_module": "FSDP; save a model that holds the gathered state_dict",
    "_checkpoint_wrapped_module": "activation checkpointing; save the model without it",
    "_orig_mod": "torch.compile; put the module's _orig_mod back first",
    "weight_g": "weight normalization; call torch.nn.utils.remove_weight_norm first",
    "weight_orig": "pruning or spectral normalization; call torch.nn.utils.prune.remove first",
}


def refuse_unsavable(model: object) -> None:
    """Raise an error that names what `model` is besides a stock model with plain weights, and a remedy."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(_not_transformers(model))
    described = f"this {type(model).__name__}"
    quantized = getattr(model, "hf_quantizer", None) or getattr(model.config, "quantization_config", None)
    if quantized:
        raise ValueError(f"{described} is quantized, which dk.load does not read; save model.dequantize()")
    state = saved_state(model, keep_vars=True)
    for name, tensor in state.items():
        if reason := _odd(tensor):
            raise ValueError(f"{name} of {described} is {reason}")
    stock = skeleton(type(model), model.config, torch.get_default_dtype())  # other threads keep theirs
    expect_quantized(stock, quantized_layers(model), quantized_kind(model))
    expected = stock.state_dict(keep_vars=True)
    if added := sorted(state.keys() - expected.keys()):
        of = (reason for part, reason in _ADDITIONS.items() if any(part in name for name in added))
        reason = next(of, "something that was put into it; merge or remove that first")
        raise ValueError(f"{described} holds {added[0]}, which its class does not have, for {reason}")
    if lacking := sorted(expected.keys() - state.keys()):
        raise ValueError(f"{described} lacks {lacking[0]}; put back what took its place before saving")
    for name, tensor in state.items():
        shape = expected[name].shape
        if tensor.shape != shape:
            raise ValueError(
                f"{name} of {described} is {[*tensor.shape]}, and {[*shape]} by its config; make them agree"
            )
        if misfit(tensor, expected[name]):
            raise ValueError(
                f"{name} of {described} is {tensor.dtype}, so it is quantized, which dk.load does not read; "
                "dequantize the model first"
            )
    _refuse_other_ties(described, state, expected)
    for name, source in copied_heads(model).items():
        if not model.get_submodule(name).stands_for(state[f"{source}.weight"]):
            raise ValueError(
                f"{name} of {described} is an 8-bit copy of {source}, which has changed since; call "
                "model.tie_weights() to copy it again before saving"
            )


def _not_transformers(model: object) -> str:
    kind = type(model).__name__
    found = f"model is a {kind}; dk.save writes transformers models"
    if kind.startswith("Peft") and callable(getattr(model, "merge_and_unload", None)):
        return f"{found}: save the model that model.merge_and_unload() returns"
    if kind.startswith("Peft"):
        return f"{found}, and a learned prompt is not part of them; model.save_pretrained writes it by itself"
    return f"{found}: it is {_WRAPPERS[kind]}" if kind in _WRAPPERS else found


def _odd(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be written, and a remedy; None if it can."""
    if tensor.is_meta:
        return "on the meta device, where nothing is stored; load the model without offloading"
    kind = type(tensor)
    if kind.__name__ == "DTensor":
        return (
            "sharded (a DTensor); gather the weights with torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(options=StateDictOptions(full_state_dict=True)), and save a model with them"
        )
    if kind not in (Tensor, nn.Parameter):
        return f"a {kind.__name__}, no plain tensor; dequantize or gather it first"
    return None


def _refuse_other_ties(described: str, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse tied weights other than the config's, since a checkpoint holds tied weights once."""
    tied: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        tied.setdefault(id(tensor), []).append(name)
    found: dict[tuple, str] = {}
    for first, *others in tied.values():
        for other in others:
            if not _is_one(state[first], state[other]) and not torch.equal(state[first], state[other]):
                raise ValueError(
                    f"{first} and {other} of {described} differ, and its config ties them; set "
                    "model.config.tie_word_embeddings = False before saving"
                )
        weight = state[first]
        twin = found.setdefault((weight.data_ptr(), weight.shape), first) if weight.numel() else first
        if twin != first:
            raise ValueError(
                f"{first} and {twin} of {described} are one tensor, and its config does not tie them; set "
                "model.config.tie_word_embeddings = True, or copy one of them, before saving"
            )


def _is_one(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape
