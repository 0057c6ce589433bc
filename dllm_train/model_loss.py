"""Run a loss inside the forward of a model, whatever wraps it.

DistributedDataParallel, FSDP, DeepSpeed, peft and torch.compile act where the forward of the model they wrap
is called. So the outermost wrapper is called, and the model at the bottom answers with losses instead of
logits. The weights of its head are read there alone, where they are gathered and cast as in any forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dllm_kernels.models.inference import naming_outputs
from dllm_kernels.models.nested_patch import nested_patch
from dllm_train.attention_masks import base_arguments, copied, rotated_by_length
from dllm_train.last_layer import cut_last_layer
from dllm_train.mask_check import refuse_models_without_masks
from dllm_train.vocabulary_head import Certainty, GivenStates, RowLosses, given, head_losses, with_base


@dataclass(frozen=True, eq=False)
class MaskedRows:
    """The rows that a forward predicts; tensors may be on any device. S: L, or 2 L for x_t ⊕ x_0.

    input_ids: int64 [B, S]. attention: its pattern, as keywords of `base_arguments`.
    row, source: int64 [N], the outputs that predict. targets: int64 [N]. weights: float [N].
    outputs: a bound above all of `source`, in 1..S.
    suppress_tokens: ids left out of the softmax, or None. certainty: the rows to force, or None.
    """

    input_ids: Tensor
    attention: dict
    row: Tensor
    source: Tensor
    targets: Tensor
    weights: Tensor
    outputs: int
    suppress_tokens: tuple[int, ...] | None = None
    certainty: Certainty | None = None


def loss_in_forward(model: nn.Module, rows: MaskedRows) -> RowLosses:
    """Return the losses of `rows`, computed inside the forward of `model`.

    model: a transformers model, or wrappers of one in any order. Raises TypeError for other models, and
    ValueError, with what to do, for wrappers and models whose loss would not be that of their own logits.
    """
    inner = wrapped_model(model)
    with ExitStack() as changed:
        changed.enter_context(nested_patch(("loss", id(inner)), partial(_answering_losses, inner)))
        changed.enter_context(naming_outputs(inner))
        for embedding in inner.get_input_embeddings().modules():
            if getattr(embedding, "padding_idx", None) is not None:
                key = ("padding_idx", id(embedding))
                changed.enter_context(nested_patch(key, partial(_training_every_row, embedding)))
        losses = model(input_ids=copied(rows.input_ids, inner.device), masked_rows=rows)
    if not isinstance(losses, RowLosses):
        raise ValueError(
            f"model is a {type(model).__name__} that returns a {type(losses).__name__} in place of what the "
            f"{type(inner).__name__} inside returns; give that model, or a wrapper that leaves outputs alone"
        )
    if losses.loss.requires_grad and any(
        getattr(m, "gradient_checkpointing", False) for m in inner.modules()
    ):
        config = inner.base_model.config
        losses.loss.register_hook(partial(_refuse_other_attention, config, config._attn_implementation))
    return losses


def wrapped_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside `model`; TypeError or ValueError as in `loss_in_forward`."""
    inner = model
    while not isinstance(inner, PreTrainedModel):
        inner = _content(inner)
        if inner is None:
            raise TypeError(
                f"model is a {type(model).__name__}; expected a transformers model, or one wrapped by "
                "DistributedDataParallel, FSDP, DeepSpeed, peft or torch.compile"
            )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model is a {type(inner).__name__}, an encoder-decoder model, whose decoder would see the "
            "noised ids shifted by one; give a model without an encoder"
        )
    return inner


def _content(wrapper) -> nn.Module | None:
    """Return the module that `wrapper` wraps, or None if it is no wrapper."""
    if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
        raise ValueError(
            f"model is a DataParallel over {len(wrapper.device_ids)} devices, whose replicas see parts of a "
            "batch; use DistributedDataParallel"
        )
    children, names = getattr(wrapper, "_modules", {}), _CONTENTS
    if "_checkpoint_wrapped_module" in children:
        raise ValueError(
            f"model is a {type(wrapper).__name__} around a whole model, which the backward pass would run "
            "again without the loss; wrap its layers, or call model.gradient_checkpointing_enable()"
        )
    # DeepSpeed's engine has every attribute of the wrapped module, also peft_config.
    if hasattr(wrapper, "peft_config") and not any(name in children for name in _CONTENTS):
        names = _PEFT_CONTENTS
        active = getattr(wrapper, "active_peft_config", None)
        if getattr(active, "is_prompt_learning", False):
            raise ValueError(
                f"model is a {type(wrapper).__name__} that learns a prompt ({active.peft_type.value}), which "
                "would take part in the attention of the objective and shift its positions. Train adapters "
                "of weights instead, such as LoRA"
            )
    return next((children[name] for name in names if name in children), None)


# torch.compile; DistributedDataParallel, DataParallel, DeepSpeed; FSDP.
_CONTENTS = ("_orig_mod", "module", "_fsdp_wrapped_module")
_PEFT_CONTENTS = ("base_model", "model")


# ---- the forward of the model at the bottom ---------------------------------------------------------------
@contextmanager
def _answering_losses(model: PreTrainedModel) -> Iterator[None]:
    before = vars(model).get("forward")
    model.forward = _ForwardOrLosses(model, before)
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


# torch.compile leaves these functions alone and compiles the base model that they call.
_not_traced = torch.compiler.disable(recursive=False)


class _ForwardOrLosses:
    """The forward of a model that answers `masked_rows` with RowLosses and all else as before.

    patched: what replaced the class's own forward on the instance, or None.
    """

    def __init__(self, model: PreTrainedModel, patched):
        self.model, self.patched = model, patched

    @_not_traced
    def __call__(self, *args, masked_rows: MaskedRows | None = None, **kwargs):
        if masked_rows is not None:
            return _losses_within(self.patched, self.model, kwargs["input_ids"], masked_rows)
        own = self.patched or MethodType(type(self.model).forward, self.model)
        return own(*args, **kwargs)


@_not_traced
def _losses_within(patched, model: PreTrainedModel, input_ids: Tensor, rows: MaskedRows) -> RowLosses:
    """Return the losses of `rows`, computed where the class's own forward would run inside `patched`.

    input_ids: those of `rows` as the wrappers passed them, on the device of the model.
    """
    # Compiled forwards compute the same. Hooks of accelerate act on the modules that are called, too.
    if patched is None or hasattr(patched, "_torchdynamo_orig_callable") or hasattr(model, "_hf_hook"):
        return _losses(model, input_ids, rows)[0]
    function = getattr(patched, "__func__", None)
    if function is None or inspect.unwrap(function) is not inspect.unwrap(type(model).forward):
        raise ValueError(
            f"the forward of this {type(model).__name__} was replaced by {patched!r}, which may change its "
            "logits; remove it (del model.forward) for the loss"
        )
    found = []

    def base():
        losses, output = _losses(model, input_ids, rows)
        found.append(losses)
        return given(output, output.last_hidden_state[:0, 0])

    function(with_base(model, GivenStates(model.base_model, base)), input_ids=input_ids)
    return found[0]


@_not_traced
def _losses(model: PreTrainedModel, input_ids: Tensor, rows: MaskedRows) -> tuple[RowLosses, ModelOutput]:
    """Return the losses of `rows` and the output of the base model."""
    arguments = base_arguments(model, input_ids, **rows.attention)
    refuse_models_without_masks(model)
    shorter = rows.outputs < input_ids.shape[1]
    context, keywords = cut_last_layer(model.base_model, rows.outputs if shorter else None)
    with context, rotated_by_length(model, input_ids.shape, **rows.attention):
        output = model.base_model(**arguments, **keywords)
    hidden = output.last_hidden_state
    row, source, targets, weights = (
        copied(tensor, hidden.device) for tensor in (rows.row, rows.source, rows.targets, rows.weights)
    )
    certainty = rows.certainty
    if certainty is not None:
        certainty = replace(certainty, rows=copied(certainty.rows, hidden.device))
    losses = head_losses(
        model, output, hidden[row, source], targets, weights, rows.suppress_tokens, certainty
    )
    return losses, output


@contextmanager
def _training_every_row(embedding: nn.Module) -> Iterator[None]:
    """Give the row of the padding token its gradient: it is the end token of LLaDA and Dream."""
    before = embedding.padding_idx
    embedding.padding_idx = None
    try:
        yield
    finally:
        embedding.padding_idx = before


def _refuse_other_attention(config, implementation: str, gradient: Tensor) -> None:
    if config._attn_implementation != implementation:
        raise ValueError(
            f"the loss was computed with {implementation!r} attention, and gradient checkpointing would "
            f"recompute its layers with {config._attn_implementation!r}: call backward() within "
            'dk.enable_attention(model), or use model.set_attn_implementation("dllm")'
        )
