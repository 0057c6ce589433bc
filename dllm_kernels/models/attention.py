"""Our attention inside transformers models, registered as "dllm" with transformers' AttentionInterface.

A forward of a model on "dllm" says what its queries see in one of three ways:
- `dllm_view=StepView(...)` (sampling): the view attends, and reads and writes cached keys and values;
- `dllm_mask=SpanMask(...)` (training, full forwards): the same spans in every layer;
- neither: the model's own mask, whatever it means (causal, padding, sliding window, packed, 4-D).
With the first two, sliding-window layers see the spans cut to their window, and `attention_mask` is not read.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from dllm_kernels.models.shared_change import shared_change
from dllm_kernels.ops.attention import block_attention
from dllm_kernels.span_mask import SpanMask

NAME = "dllm"

# What to give as attention_mask beside a view: models pass 4-D masks on as they are and make none themselves.
VIEW_ONLY = torch.empty(0, 0, 0, 0, device="cpu")

# What some architectures add to attention scores and the kernels do not have.
_UNSUPPORTED = ("softcap", "s_aux", "head_mask", "position_bias")


@contextmanager
def enable_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within this context `model` computes attention with our operators; afterwards as it did before.

    The model keeps its projections, positions and mask (causal, padding, 4-D). Models that share the
    config object switch together, since transformers keeps the choice there. Contexts may be nested and may
    overlap in several threads: the last to leave restores what the first one found.
    """
    with ExitStack() as switched:
        for config in _configs(model):
            switched.enter_context(shared_change(("attention", id(config)), partial(_restored, config)))
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
    """The distinct configs of `model` and its submodels; an error if one cannot be hooked."""
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
                    "transformers' AttentionInterface. Sample it as a function of its ids, under its own "
                    'mask, with cache="none": dk.sample(lambda ids: model(ids).logits, ..., cache="none")'
                )
            configs[id(module.config)] = module.config
    return list(configs.values())


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | ModelMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    dllm_view=None,
    dllm_mask: SpanMask | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """One layer's attention: query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D] -> [B, Sq, Hq, D]."""
    if module.training and dropout > 0:
        raise ValueError(
            f"attention dropout is {dropout}, and this attention has none: load the model with "
            "attention_dropout=0.0 (GPT-2: attn_pdrop, BERT: attention_probs_dropout_prob)"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {name}, which this attention does not have")
    if dllm_view is not None:
        output = dllm_view.attend(module.layer_idx, query, key, value, scaling, sliding_window)
    else:
        if dllm_mask is None:
            mask = _own_mask(module, attention_mask, query, key)
        elif sliding_window is None:
            mask = dllm_mask
        else:
            mask = _windowed(dllm_mask, kwargs.get("position_ids"), sliding_window)
        output = block_attention(query, key, value, mask, scale=scaling)
    return output.transpose(1, 2), None


def view_not_handed_on(what: str) -> str:
    """What to say when a model does not pass its keywords on to its attention."""
    return (
        f"the view did not reach the attention of {what}, which does not hand its keywords on; sample it as "
        "a function of its ids, under its own mask: "
        'dk.sample(lambda ids: model(ids).logits, ..., cache="none")'
    )


class ModelMask:
    """A model's own mask as transformers describes it; becomes spans when a layer first asks for them."""

    def __init__(
        self, *, q_length, kv_length, mask_function, q_offset=0, kv_offset=0, attention_mask=None, **more
    ):
        self.arguments = dict(
            q_length=q_length, kv_length=kv_length, mask_function=mask_function, q_offset=q_offset,
            kv_offset=kv_offset, attention_mask=attention_mask,
        )  # fmt: skip
        self.more = {name: more[name] for name in ("batch_size", "use_vmap", "device") if name in more}
        self.function, self.kv_length = mask_function, kv_length
        self.padding = None if attention_mask is None else attention_mask[:, kv_offset:][:, :kv_length]
        self.query = torch.arange(q_length, device=more.get("device")) + q_offset - kv_offset

    @cached_property
    def spans(self) -> SpanMask:
        """The mask over keys 0..kv_length-1."""
        keys = self._real_keys()
        if keys is None or self.function not in (causal_mask_function, bidirectional_mask_function):
            dense = sdpa_mask(**self.arguments, **self.more, allow_is_causal_skip=False)
            return SpanMask.from_dense(dense[:, 0])
        start, end = (bound[:, None].expand(-1, len(self.query)) for bound in keys)
        if self.function is causal_mask_function:
            end = torch.minimum(end, self.query + 1).maximum(start)
        spans = torch.stack([start, end], dim=-1)[:, :, None]
        spans = spans.masked_fill((start >= end)[..., None, None], 0)
        return SpanMask(spans.int(), self.kv_length)

    def _real_keys(self) -> tuple[Tensor, Tensor] | None:
        """First and last + 1 of each row's unpadded keys, [B] or [1]; None where they have holes."""
        if self.padding is None:
            bound = self.query.new_zeros(1)
            return bound, bound + self.kv_length
        real = torch.nn.functional.pad(self.padding.bool(), (0, self.kv_length - self.padding.shape[1]))
        start = real.int().argmax(1)
        end = start + real.sum(1)
        index = torch.arange(self.kv_length, device=real.device)
        whole = (index >= start[:, None]) & (index < end[:, None])
        return (start, end) if torch.equal(whole, real) else None


def _own_mask(module, attention_mask, query: Tensor, key: Tensor) -> SpanMask | None:
    """The spans of the mask that the model made itself or was given."""
    if isinstance(attention_mask, ModelMask):
        return attention_mask.spans
    if attention_mask is None:
        queries, keys = query.shape[2], key.shape[2]
        if getattr(module, "is_causal", False) and queries > 1:
            return ModelMask(
                q_length=queries, kv_length=keys, q_offset=keys - queries,
                mask_function=causal_mask_function, device=query.device,
            ).spans  # fmt: skip
        return None
    if attention_mask.shape == VIEW_ONLY.shape:
        raise ValueError(view_not_handed_on(type(module).__name__))
    if attention_mask.dim() == 4:
        return _spans_of_4d(attention_mask, key.shape[2])
    raise ValueError(f"attention_mask is {list(attention_mask.shape)}; allowed: [B, S] or [B, 1, Sq, Sk]")


def _spans_of_4d(mask: Tensor, keys: int) -> SpanMask:
    """The spans of a boolean (True = visible) or additive (0 or -inf) mask [B, 1, Sq, >= keys]."""
    known = _LAST_4D.get("mask", lambda: None)() is mask and _LAST_4D["key"] == (mask._version, keys)
    if not known:
        if mask.shape[1] != 1:
            raise ValueError(f"attention_mask is {list(mask.shape)}; a mask per head cannot be kept as spans")
        visible = mask[:, 0, :, :keys]
        if visible.dtype != torch.bool:
            hidden = visible < 0.5 * torch.finfo(visible.dtype).min
            if not (hidden | (visible == 0)).all():
                raise ValueError(
                    "attention_mask adds values other than 0 and -inf: a bias cannot be kept as spans; "
                    "run this model with its own attention"
                )
            visible = ~hidden
        spans = SpanMask.from_dense(visible)
        _LAST_4D.update(mask=weakref.ref(mask), key=(mask._version, keys), spans=spans)
    return _LAST_4D["spans"]


# All layers of one forward share one mask; the latest is kept so that it is converted once.
_LAST_4D: dict = {}


def within_window(spans: Tensor, query: Tensor, key: Tensor, window: int) -> Tensor:
    """spans [B, Sq, R, 2] cut to the keys with |position(q) - position(k)| < window, which is how
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


def _windowed(mask: SpanMask, position_ids: Tensor | None, window: int) -> SpanMask:
    """`mask` cut to a sliding window; kept with the mask, for the other layers."""
    kept = mask.__dict__.setdefault("_windowed", {})
    if window not in kept:
        position = position_ids
        if position is None:
            position = torch.arange(mask.kv_len, device=mask.spans.device)[None]
        if mask.spans.shape[1] != mask.kv_len:
            raise ValueError("a sliding window needs as many queries as keys in dllm_mask")
        batch = max(mask.spans.shape[0], position.shape[0])
        spans = mask.spans.expand(batch, -1, -1, -1)
        kept[window] = SpanMask(within_window(spans, position, position, window), mask.kv_len)
    return kept[window]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, ModelMask)
