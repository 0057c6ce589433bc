"""Our attention inside transformers models, registered as "dllm" with transformers' AttentionInterface.

A forward of a model on "dllm" says what its queries see in one of three ways:
- `dllm_view=StepView(...)` (sampling): the view attends, and reads and writes cached keys and values;
- `dllm_mask=SpanMask(...)` (training, full forwards): the same spans in every layer;
- neither: the model's own mask (causal, padding, sliding window, packed, 4-D), and that of its training if
  the model is marked for diffusion (model_masks.py).
With the first two, sliding-window layers see the spans cut to their window, and `attention_mask` is not read.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from dllm_kernels.models.families import FAMILIES, is_masked_lm
from dllm_kernels.models.late_rotation import take_rotation
from dllm_kernels.models.model_masks import (
    NAME,
    UNKNOWN_PATTERN,
    span_mask_interface,
    spans_of_4d,
    trained_kind,
    unknown_pattern,
)
from dllm_kernels.models.nested_patch import nested_patch
from dllm_kernels.models.wrappers import unwrapped
from dllm_kernels.ops.attention import block_attention
from dllm_kernels.ops.rotate_half import rotate_half
from dllm_kernels.span_mask import SpanMask, trusted_mask

# The attention_mask to pass beside a view: models hand 4-D masks on as they are and make none themselves.
VIEW_ONLY = torch.empty(0, 0, 0, 0, device="cpu")

_PROBE = "dllm_probe"

# Terms that some architectures add to attention scores and that the kernels do not have.
_UNSUPPORTED = ("softcap", "s_aux", "head_mask", "position_bias")

# The remedy for a model that cannot use our attention.
AS_A_FUNCTION = (
    "Sample it as a function of its ids, under its own mask: "
    'dk.sample(lambda ids: model(ids).logits, ..., cache="none")'
)


@contextmanager
def enable_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Make `model` compute attention with our operators within this context; afterwards as before.

    The model keeps its projections, positions and mask (causal, padding, 4-D). Models that share the
    config object switch together, since transformers keeps the choice there. Contexts may be nested and may
    overlap across threads: the last to leave restores the state that the first one found.
    """
    with ExitStack() as switched:
        for config in _configs(model):
            switched.enter_context(nested_patch(("attention", id(config)), partial(_restored, config)))
            config._attn_implementation_internal = NAME
        yield model


@contextmanager
def _restored(config) -> Iterator[None]:
    before = config._attn_implementation
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _configs(model: PreTrainedModel) -> list:
    """Return the distinct configs of `model` and its submodels; an error if one cannot be hooked."""
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; our attention hooks into transformers models. "
            'Any callable from ids to logits can be sampled with cache="none"'
        )
    configs = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            if not module._can_set_attn_implementation():
                raise ValueError(
                    f"the attention of {type(module).__name__} cannot be hooked: it does not go through "
                    f"transformers' AttentionInterface. {AS_A_FUNCTION}"
                )
            configs[id(module.config)] = module.config
    return list(configs.values())


def see_as_trained(model: PreTrainedModel) -> None:
    """Give direct calls of `model` the mask that its config's "diffusion" entry says it was trained with.

    Bidirectional decoders get transformers' own `config.is_causal = False`, which config.json keeps, and stay
    on their attention implementation unless it ignores that. Block-causal models go to ours, or to "eager" if
    their attention has more than ours (soft caps, sinks, wider heads).
    """
    config = model.config
    vars(config).pop("is_causal", None)
    if sees_whole_rows(model):
        config.is_causal = False
    if not model._can_set_attn_implementation():
        if config._attn_implementation == "sdpa":
            config._attn_implementation_internal = "eager"  # which adds a mask in every layer
    elif trained_kind(config)[0] == "block_causal" or not _hands_on_is_causal(model):
        model.set_attn_implementation(NAME)
    if config.model_type not in FAMILIES and trained_kind(config) not in _NO_TOKEN_AHEAD:
        _check_looks_ahead(model)


def sees_whole_rows(model: PreTrainedModel) -> bool:
    """Return whether `model` is a decoder that was trained with bidirectional attention."""
    return trained_kind(model.config) == ("bidirectional", 1) and not is_masked_lm(model)


def _hands_on_is_causal(model: PreTrainedModel) -> bool:
    """Return whether `is_causal=False` reaches the first attention layer: as argument, as a mask, or because
    the layer is an encoder's. The forward ends there."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(_PROBE)
        with torch.no_grad():
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device))
    except _Reached as reached:
        return reached.bidirectional
    except Exception:  # the forward needs more than ids
        return False
    finally:
        model.set_attn_implementation(before)
    return False


class _Reached(Exception):
    """Raised to end a forward in its first attention."""

    def __init__(self, bidirectional: bool):
        self.bidirectional = bidirectional


def _probe(module, query, key, value, attention_mask, is_causal: bool | None = None, **_):
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    raise _Reached(attention_mask is not None or not causal)


# Kinds of training that two tokens cannot test: blocks of one token, and of unknown size.
_NO_TOKEN_AHEAD = (("block_causal", 1), ("block_causal", None))


def _check_looks_ahead(model: PreTrainedModel) -> None:
    """Leave our attention to "eager" where `model` asks for more than ours has, and warn if its first token
    does not see the second: some architectures are causal whatever mask they are given."""
    ahead = _looks_ahead(model)
    if ahead is None and model.config._attn_implementation == NAME:
        model.set_attn_implementation("eager")
        ahead = _looks_ahead(model)
    if ahead is False:
        warnings.warn(
            f"{type(model).__name__} computes causal logits when it is called directly, whatever the "
            "diffusion entry of its config says: in transformers its tokens see none after them",
            stacklevel=4,
        )


def _looks_ahead(model: PreTrainedModel) -> bool | None:
    """Return whether the output of a row's first token changes with its second; None if the forward fails."""
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    try:
        with torch.no_grad():
            first, second = model.base_model(input_ids=ids)[0][:, 0]
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None
    return not torch.equal(first, second)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    dllm_view=None,
    dllm_mask: SpanMask | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend in one layer: query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D] -> [B, Sq, Hq, D]."""
    if module.training and dropout > 0:
        raise ValueError(
            f"attention dropout is {dropout}, and this attention has none: load the model with "
            "attention_dropout=0.0 (GPT-2: attn_pdrop, BERT: attention_probs_dropout_prob), or train it on "
            'model.set_attn_implementation("sdpa")'
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} uses {name}, which this attention does not have; "
                'model.set_attn_implementation("eager") has it'
            )
    if dllm_view is None and _forward.by_view:
        raise ValueError(view_not_handed_on(type(module).__name__))
    width, rotation = value.shape[3], take_rotation(query, key)
    if rotation is not None and (dllm_view is None or width != query.shape[3] or width % 8):
        query, key = rotate_half(query, key, *rotation)  # of their own width
        rotation = None
    query, key, value, scaling = _of_one_width(query, key, value, scaling)
    if dllm_view is not None:
        late = () if rotation is None else (rotation,)
        output = dllm_view.attend(
            getattr(module, "layer_idx", None), query, key, value, scaling, sliding_window, *late
        )
    else:
        if dllm_mask is None:
            mask = _own_mask(module, attention_mask, query, key)
        elif sliding_window is None:
            mask = dllm_mask
        else:
            mask = windowed(dllm_mask, kwargs.get("position_ids"), sliding_window)
        output = block_attention(query, key, value, mask, scale=scaling)
    output = output.transpose(1, 2)
    return output if output.shape[3] == width else output[..., :width].contiguous(), None


def _of_one_width(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """Return heads padded with zeros to one width that the kernels have (latent attention has narrower
    values), and the scale of the original width."""
    widths = query.shape[3], value.shape[3]
    padded = -(-max(widths) // 8) * 8
    if widths == (padded, padded):
        return query, key, value, scaling
    heads = (torch.nn.functional.pad(part, (0, padded - part.shape[3])) for part in (query, key, value))
    return *heads, query.shape[3] ** -0.5 if scaling is None else scaling


class _Forward(threading.local):
    """The forward that runs in this thread: whether all its attention is to come through a view."""

    by_view: bool = False


_forward = _Forward()


@contextmanager
def attention_by_view() -> Iterator[None]:
    """Raise an error for attention that no view reaches, within this context and thread."""
    _forward.by_view = True
    try:
        yield
    finally:
        _forward.by_view = False


def view_not_handed_on(what: str) -> str:
    """Return the error of a model that does not pass its keywords on to its attention."""
    return f"the view did not reach the attention of {what}, which does not hand its keywords on"


def _own_mask(module, attention_mask: Tensor | None, query: Tensor, key: Tensor) -> SpanMask | None:
    """Return the spans of the mask that the model made itself or was given."""
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        if not getattr(module, "is_causal", False) or queries == 1:
            return None
        spans = span_mask_interface(
            batch_size=len(query), q_length=queries, kv_length=keys, q_offset=keys - queries,
            mask_function=causal_mask_function, config=getattr(module, "config", None), device=query.device,
        )  # fmt: skip
        return trusted_mask(spans[:, 0], keys)
    name = type(module).__name__
    if attention_mask.shape == VIEW_ONLY.shape:
        raise ValueError(f"{view_not_handed_on(name)}. {AS_A_FUNCTION}")
    if attention_mask.shape == UNKNOWN_PATTERN.shape:
        raise ValueError(unknown_pattern(name))
    if attention_mask.dim() == 5:
        return trusted_mask(attention_mask[:, 0], keys)
    if attention_mask.dim() == 4 and _fits(attention_mask, len(query), queries, keys):
        return trusted_mask(spans_of_4d(attention_mask, keys), keys)
    raise ValueError(
        f"attention_mask is {list(attention_mask.shape)}; allowed: [B, S] or [B, 1, Sq, Sk] = "
        f"[{len(query)}, 1, {queries}, {keys}]"
    )


def _fits(mask: Tensor, batch: int, queries: int, keys: int) -> bool:
    """Return whether a 4-D mask is of these sizes; those of static caches may have more columns."""
    rows, _, height, width = mask.shape
    return rows in (1, batch) and height == queries and width >= keys


def within_window(spans: Tensor, query: Tensor, key: Tensor, window: int) -> Tensor:
    """Return spans [B, Sq, R, 2] cut to the keys with |position(q) - position(k)| < window, as
    transformers counts a sliding window.

    query [B or 1, Sq]: position of each query; key [B or 1, Sk]: of each key, rising by one within a span.
    """
    start, end = spans.long().unbind(-1)
    index = start.clamp(max=key.shape[1] - 1).flatten(1)
    first = key.expand(index.shape[0], -1).gather(1, index).view_as(start)
    distance = query[..., None] - first
    low = torch.maximum(start, start + distance - window + 1)
    high = torch.minimum(end, start + distance + window)
    cut = torch.stack([low, high], dim=-1).masked_fill((low >= high)[..., None], 0)
    order = (low >= high).long().argsort(dim=-1, stable=True)
    return cut.gather(2, order[..., None].expand_as(cut)).int()


def windowed(mask: SpanMask, position_ids: Tensor | None, window: int) -> SpanMask:
    """Return `mask` cut to a sliding window, and keep it with the mask for the other layers.

    position_ids: int64 [B or 1, S], of queries and keys alike; None, from models that do not hand them on:
    those of an earlier call, else 0, 1, 2, ...
    """
    kept = mask.__dict__.setdefault("_windowed", {})
    positions, cut = kept.get(window, (None, None))
    if cut is None or (position_ids is not None and position_ids is not positions):
        positions = position_ids
        if positions is None:
            positions = torch.arange(mask.kv_len, device=mask.spans.device)[None]
        if mask.spans.shape[1] != mask.kv_len:
            raise ValueError("a sliding window needs as many queries as keys in dllm_mask")
        spans = mask.spans.expand(max(mask.spans.shape[0], positions.shape[0]), -1, -1, -1)
        cut = trusted_mask(within_window(spans, positions, positions, window), mask.kv_len)
        kept[window] = position_ids, cut
    return cut


AttentionInterface.register(NAME, attention)
AttentionInterface.register(_PROBE, _probe)
AttentionMaskInterface.register(_PROBE, sdpa_mask)
