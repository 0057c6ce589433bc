"""Probe a model for what it computes besides attention, and for the inputs of its attention.

Sampling lays rows end to end and keeps keys and values, which is right only if tokens depend on each other
through attention alone. A config does not say so: state-space layers, convolutions and hashed n-grams occur
in models of all names. So a few tokens go through the model with attention that passes every token its own
value.
Then no token may depend on another: NaN in one must stay there, and equal tokens at equal positions must come
out equal.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllm_kernels.models.attention import AS_A_FUNCTION, VIEW_ONLY, attention_by_view
from dllm_kernels.models.families import Diffusion
from dllm_kernels.models.inference import inference
from dllm_kernels.models.rotary import LengthDependentRotary
from dllm_kernels.models.shadow import shadow


@dataclass(frozen=True)
class Traits:
    """Facts about a model that sampling needs.

    kv_heads, head_dims: of each attention call in a forward, in turn.
    local: whether tokens depend on each other through attention alone. If not, rows are computed one by one
    and nothing is cached. causal: whether the other dependences only look back.
    mask: the attention_mask to pass to the model. rotary: rotary modules that depend on the length of a row.
    """

    kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    local: bool
    causal: bool
    mask: Tensor | None
    rotary: LengthDependentRotary

    @property
    def calls(self) -> int:
        """Return the number of attention calls in a forward."""
        return len(self.kv_heads)


_KNOWN: weakref.WeakKeyDictionary[PreTrainedModel, tuple[tuple, Traits]] = weakref.WeakKeyDictionary()
_PROBING = threading.RLock()

WIDEST_HEAD = 256  # dimensions that the kernels take


def traits_of(model: PreTrainedModel, diffusion: Diffusion) -> Traits:
    """Return the traits of `model`, found by a few tiny forwards when it is new or its modules have changed.

    The model is left as it was, and its users' hooks are not called. ValueError, which names the model and
    what to do, if it cannot be sampled with our attention.
    """
    with _PROBING:
        structure = structure_of(model)
        known = _KNOWN.get(model)
        if known is None or known[0] != structure:
            with inference(model), torch.inference_mode():
                known = structure, _Probe(model, shadow(model).base_model, diffusion).traits()
            _KNOWN[model] = known
        return known[1]


def structure_of(model: nn.Module) -> tuple:
    """Return a value that changes with the modules, forwards, dtypes or devices of a model."""
    return tuple(
        (id(module), type(module), id(vars(module).get("forward")), *map(_place, module._parameters.values()))
        for module in model.modules()
    )


def _place(parameter: Tensor | None) -> tuple | None:
    return None if parameter is None else (type(parameter), parameter.dtype, parameter.device)


# ---- the forwards ------------------------------------------------------------------------------------------
_TOKENS, _POSITIONS, _TAINTED = (5, 6, 5, 7), (3, 0, 3, 4), 1
_FURTHEST = 1 << 16  # position of models that have any number


@dataclass(eq=False)
class _OwnValues:
    """A view in which every token sees only itself. seen: queries, keys and values of each call."""

    layers: set[int] = field(default_factory=set)
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale, window) -> Tensor:
        """Attend as StepView.attend does."""
        if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == value.shape[2] == len(_TOKENS):
            raise ValueError("its attention sees something else than the tokens of its input")
        self.layers.add(len(self.layers))
        self.seen.append((query, key, value))
        own = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return own.transpose(1, 2).contiguous().transpose(1, 2)


@dataclass(frozen=True)
class _Probe:
    """`body`, which computes as the base model of `model` does."""

    model: PreTrainedModel
    body: nn.Module
    diffusion: Diffusion

    def traits(self) -> Traits:
        limit = self.diffusion.max_positions
        last = (limit or _FURTHEST) - 1
        rotary = LengthDependentRotary(self.body)
        with rotary.fixed(last + 1):
            mask, seen = self.first_forward(last)
            tainted = _not_a_number(seen)
            local = causal = not tainted and _alike(seen, seen, 0, 2)
            if local:
                self.refuse_other_lengths(seen, self.forward((*_POSITIONS[:3], last), mask))
            else:
                whole, mask = range(len(_TOKENS)), None
                seen = self.forward(whole, mask, taint=False)
                if _not_a_number(seen):
                    self.refuse("it computes NaN; look for NaN and for numbers too large in its weights")
                another = self.forward(whole, mask, (*_TOKENS[:3], _TOKENS[3] + 1), taint=False)
                causal = all(_alike(seen, another, token, token) for token in whole[:3])
        shapes = [(key.shape[1], key.shape[3]) for _, key, _ in seen[:-1]]
        if not shapes:
            self.refuse("it has no attention, so that a token sees nothing of what follows it")
        if (widest := max(width for _, width in shapes)) > WIDEST_HEAD:
            self.refuse(f"its heads have {widest} dimensions, and our attention at most {WIDEST_HEAD}")
        return Traits(*zip(*shapes, strict=True), local, causal, mask, LengthDependentRotary(self.model))

    def first_forward(self, last: int) -> tuple[Tensor | None, list]:
        """Return the attention mask that the model takes, and the values seen in its forward."""
        positions = [min(position, last) for position in _POSITIONS]
        try:
            return VIEW_ONLY, self.forward(positions, VIEW_ONLY)
        except ValueError:  # state-space layers, too, may look at a mask that is for attention
            return None, self.forward(positions, None)

    def forward(
        self, positions, mask: Tensor | None, tokens: tuple[int, ...] = _TOKENS, taint: bool = True
    ) -> list[tuple[Tensor, ...]]:
        """Return queries, keys and values of each attention call, and the hidden states, [1, ..., N, D]."""
        device, view, thread = self.model.device, _OwnValues(), threading.get_ident()

        def tainted(module, inputs, output):
            if threading.get_ident() == thread:
                output = output.clone()
                output[:, _TAINTED] = torch.nan
            return output

        size = self.diffusion.vocab_size
        ids = torch.tensor([[token % size for token in tokens]], device=device)
        position_ids = torch.tensor([list(positions)], device=device) + self.diffusion.first_position
        with ExitStack() as undone:
            if taint:
                hook = self.body.get_input_embeddings().register_forward_hook(tainted)
                undone.callback(hook.remove)
            undone.enter_context(attention_by_view())
            try:
                hidden = self.body(
                    input_ids=ids,
                    position_ids=position_ids,
                    attention_mask=mask,
                    use_cache=False,
                    dllm_view=view,
                )[0]
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.refuse(str(error).strip().rstrip("."), error)
        return [*view.seen, (hidden,)]

    def refuse_other_lengths(self, seen: list, further: list) -> None:
        if not (_alike(seen, further, 0, 0) and _alike(seen, further, 2, 2)):
            self.refuse("its keys depend on the length of the sequence, in a way that is not known here")

    def refuse(self, reason: str, cause: Exception | None = None) -> NoReturn:
        name = type(self.model).__name__
        raise ValueError(f"{name} cannot be sampled with our attention: {reason}. {AS_A_FUNCTION}") from cause


def _not_a_number(seen: list[tuple[Tensor, ...]]) -> bool:
    """Return whether a token other than the tainted one has NaN."""
    others = [token for token in range(len(_TOKENS)) if token != _TAINTED]
    return any(bool(part[..., others, :].isnan().any()) for parts in seen for part in parts)


def _alike(some: list[tuple[Tensor, ...]], others: list[tuple[Tensor, ...]], here: int, there: int) -> bool:
    """Return whether the values of two tokens are equal up to rounding."""
    for part, other in zip(chain(*some), chain(*others), strict=True):
        one, two = part[..., here, :].float(), other[..., there, :].float()
        most = 1e-3 if part.dtype == torch.float32 else 0.1
        if not bool((one - two).norm() <= most * one.norm()):
            return False
    return True
