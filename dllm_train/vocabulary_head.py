"""Losses and statistics of chosen hidden states under a model's own vocabulary head.

A head that is plain (modules in turn, the last one a linear layer) goes through
`linear_diffusion_cross_entropy` or `linear_token_stats`. Any other head (adapters, soft caps, scales, hooks,
quantized or distributed weights) is left to the model: its own forward runs on a view of the model whose base
model returns the chosen states, a few rows at a time.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from dllm_kernels import (
    diffusion_cross_entropy,
    linear_diffusion_cross_entropy,
    linear_token_stats,
    token_stats,
)
from dllm_kernels.models.families import FAMILIES
from dllm_kernels.models.head import head_modules, head_state, outside_base
from dllm_kernels.models.merged_projections import is_plain_linear
from dllm_kernels.ops.token_stats import TokenStats
from dllm_train.sharding import is_sharded

ROWS_AT_ONCE = 512
_ROWS_TRIED = 3
_TELLING_LOGIT = 1000.0


@dataclass(frozen=True)
class Certainty:
    """Certainty forcing (dParallel). rows: float [N], 1 if forced, else 0. temperature: divides logits."""

    rows: Tensor
    temperature: float


@dataclass
class RowLosses(ModelOutput):
    """loss: scalar with gradient, Σ weights_i · CE_i. ce: each CE_i [N], detached.

    With certainty also, over its rows whose argmax is the target, entropy_sum: scalar with gradient, the sum
    of their entropies; right: their number, a scalar on the device.
    """

    loss: Tensor | None = None
    ce: Tensor | None = None
    entropy_sum: Tensor | None = None
    right: Tensor | None = None


@torch.compiler.disable
def head_losses(
    model, output, states: Tensor, targets, weights, suppress_tokens, certainty: Certainty | None = None
) -> RowLosses:
    """Return the losses of chosen rows under the head of `model`.

    output: of its base model; states [N, hidden]: rows of output.last_hidden_state. targets: int64
    [N]; weights: float [N]. Raises ValueError for models whose logits are not made row by row from states.
    """
    modules = _head(model)
    options = {"suppress_tokens": suppress_tokens, "return_ce": True}
    if _is_plain(model, modules, output) and certainty is None:
        *transform, projection = modules
        loss, ce = linear_diffusion_cross_entropy(
            _in_turn(transform, states), projection.weight, targets, weights, projection.bias, **options
        )
        return RowLosses(loss, ce)

    def losses(states, targets, weights, certain=None):
        logits = own_logits(model, output, states)
        loss, ce = diffusion_cross_entropy(logits, targets, weights, **options)
        if certain is None:
            return loss, ce
        return loss, ce, *_entropies(logits, targets, certain, certainty.temperature, suppress_tokens)

    given_rows = (
        (states, targets, weights) if certainty is None else (states, targets, weights, certainty.rows)
    )
    if is_sharded(outside_base(model)):  # processes with more rows than others would wait for them forever
        return RowLosses(*losses(*given_rows))
    if torch.is_grad_enabled():
        losses = functools.partial(checkpoint, losses, use_reentrant=False)
    chunks = zip(*(tensor.split(ROWS_AT_ONCE) for tensor in given_rows), strict=True)
    loss, ce, *sums = zip(*(losses(*rows) for rows in chunks), strict=True)
    return RowLosses(torch.stack(loss).sum(), torch.cat(ce), *(torch.stack(part).sum() for part in sums))


@torch.no_grad()
def head_statistics(model, output, states: Tensor, **options) -> TokenStats:
    """Return the statistics of chosen rows under the head of `model`; options: those of `linear_token_stats`.

    output, states and errors as in `head_losses`.
    """
    modules = _head(model)
    if _is_plain(model, modules, output):
        *transform, projection = modules
        return linear_token_stats(_in_turn(transform, states), projection.weight, projection.bias, **options)
    chunks = [token_stats(own_logits(model, output, rows), **options) for rows in states.split(ROWS_AT_ONCE)]
    return TokenStats(
        *(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True))
    )


def _entropies(logits, targets, certain, temperature, suppress_tokens) -> tuple[Tensor, Tensor]:
    """Return Σ entropy of softmax(logits / temperature) over `certain` rows whose argmax is the target, and
    their number."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    barred = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    for token in suppress_tokens or ():  # a list of indices would be copied, and the host would wait
        barred[token] = True
    lowest = torch.finfo(logits.dtype).min
    right = certain * (logits.detach().masked_fill(barred, lowest).argmax(-1) == targets)
    log_p = torch.log_softmax((logits / temperature).masked_fill(barred, lowest), dim=-1)
    # The gradient of p is log p, which would overflow at `lowest` and become 0 * inf.
    return -((log_p.exp() * log_p.masked_fill(barred, 0.0)).sum(-1) * right).sum(), right.sum()


def own_logits(model, output, states: Tensor) -> Tensor:
    """Return logits [N, V] that the forward of `model` makes of states [N, hidden] of its base model."""
    view = with_base(model, GivenStates(model.base_model, lambda: given(output, states)))
    ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
    return type(model).forward(view, input_ids=ids).logits[0]


def given(output, states: Tensor):
    """Return states [N, hidden] as one row of an output of the kind of `output`."""
    kind = type(output) if hasattr(output, "last_hidden_state") else BaseModelOutput
    return kind(last_hidden_state=states[None])


def with_base(model, base):
    """Return a view of `model` that shares all its modules but the base model, which `base` replaces."""
    if model.base_model_prefix not in model._modules:
        raise ValueError(_without_head(model))
    view = object.__new__(type(model))
    view.__dict__.update(model.__dict__)
    view.__dict__.pop("forward", None)
    view.__dict__["_modules"] = {**model._modules, model.base_model_prefix: base}
    return view


class GivenStates:
    """Stand-in for a base model: a call returns `output()`, all else is the base model's."""

    def __init__(self, base, output):
        self._base, self._output = base, output

    def __call__(self, *args, **kwargs):
        return self._output()

    @property
    def decoder(self):
        """Return itself: OPT and BART call the decoder of their base model."""
        return self

    def __getattr__(self, name):
        return getattr(self._base, name)


# ---- which heads are plain -----------------------------------------------------------------------------
def _head(model) -> tuple:
    """Return the functions that should turn hidden states into logits, in turn."""
    family = FAMILIES.get(model.config.model_type)
    if family is not None and family.head:
        return head_modules(model, family)
    embeddings = model.get_output_embeddings()
    if embeddings is None:
        raise ValueError(_without_head(model))
    return (embeddings,)


def _without_head(model) -> str:
    return (
        f"model is a {type(model).__name__}, without a vocabulary head; load it with AutoModelForCausalLM or "
        "AutoModelForMaskedLM"
    )


def _ends_plainly(modules: tuple) -> bool:
    projection = modules[-1]
    tensors = (torch.Tensor, nn.Parameter)  # a subclass may be quantized or distributed
    return is_plain_linear(projection) and type(projection.weight) in tensors


def _is_plain(model, modules: tuple, output) -> bool:
    """Return whether `modules` give the logits of `model`: tried on a few rows, once per state of its head.

    Raises ValueError if logits are not made row by row from the states of the base model.
    """
    state = head_state(model, modules)
    tried, plain = _TRIED.get(model, (None, None))
    if tried == state:
        return plain
    states = output.last_hidden_state.detach().flatten(0, -2)[:_ROWS_TRIED]
    try:
        plain = _ends_plainly(modules) and _holds_nothing_else(model, modules)
        plain = plain and _gives_own_logits(model, modules, output, states)
        seen = plain or is_sharded(outside_base(model)) or _rows_are_apart(model, output, states)
    except Exception as error:
        raise ValueError(
            f"the logits of {type(model).__name__} cannot be made row by row from the states of its base "
            f"model ({type(error).__name__}: {error}). Give its own logits of the noised ids, under the "
            "attention that it was trained for, to dk.diffusion_cross_entropy"
        ) from error
    if seen:
        _TRIED[model] = state, plain
    return plain


# By model: the state of its head when it was tried, and whether it was plain. Holds no part of the model.
_TRIED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _holds_nothing_else(model, modules) -> bool:
    """Return whether the base model and `modules` hold all parameters, so that no learned scale is left."""
    listed = [*modules, model.base_model]
    known = {id(p) for module in listed if isinstance(module, nn.Module) for p in module.parameters()}
    return all(id(p) in known for p in model.parameters())


def _gives_own_logits(model, modules, output, states) -> bool:
    """Return whether `modules` are seen to give the model's own logits; zero weights hide it.

    States are scaled until a soft cap would show.
    """
    with torch.no_grad():
        logits = _in_turn(modules, states)
        states = states * (_TELLING_LOGIT / logits.abs().max().clamp(min=_TELLING_LOGIT / 1e6))
        logits, own = _in_turn(modules, states), own_logits(model, output, states)
    if not logits.any() or not logits.isfinite().all():
        return False
    return torch.equal(own, logits.to(own.dtype))


def _in_turn(functions, states: Tensor) -> Tensor:
    for function in functions:
        states = function(states)
    return states


def _rows_are_apart(model, output, states) -> bool:
    """Return whether the first row's logits are seen to depend on its own states alone; zero weights hide it.

    Gradients tell despite dropout. Raises ValueError if they depend on another row.
    """
    with torch.inference_mode(False), torch.enable_grad():
        states = states.clone().requires_grad_()
        logits = own_logits(model, output, states)
        if logits.shape[:-1] != states.shape[:-1]:
            raise ValueError(f"{list(logits.shape)} logits for {list(states.shape)} states")
        (gradient,) = torch.autograd.grad(logits[0].float().square().sum(), states)
    if gradient[1:].any():
        raise ValueError("it mixes positions")
    return bool(gradient[0].any())
