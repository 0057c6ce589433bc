"""Arguments that give a transformers base model an objective's mask on any attention implementation.

A mask has the form that the model's attention implementation takes: boolean for "sdpa", additive for "eager",
a BlockMask for "flex_attention", spans for ours. transformers hands a 4-D mask to every layer as it is, so a
sliding window has to be part of the mask, and layers of several kinds take one mask for each kind.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dllm_kernels import SpanMask
from dllm_kernels.models.attention import NAME as OURS
from dllm_kernels.models.attention import VIEW_ONLY, windowed
from dllm_kernels.models.rotary import rotary_of
from dllm_kernels.span_mask import trusted_mask
from dllm_train.documents import places

_REMEDY = 'Use model.set_attn_implementation("dllm") or call the loss within dk.enable_attention(model)'


def hidden_states(model, input_ids: Tensor, **attention) -> Tensor:
    """Return the last hidden states [B, S, hidden]; arguments as in `base_arguments`."""
    arguments = base_arguments(model, input_ids, **attention)
    with rotated_by_length(model, input_ids.shape, **attention):
        return model.base_model(**arguments).last_hidden_state


@torch.compiler.disable
def rotated_by_length(
    model, shape: Sequence[int], *, kind: str, lengths=None, document_lengths=None, **_
) -> AbstractContextManager[None]:
    """Return a context in which every row or packed document of ids, `shape` [B, S], is rotated as if it were
    alone, also where frequencies depend on the length. The keywords are those of `base_arguments`."""
    rotary = rotary_of(model.base_model)
    if not rotary:
        return nullcontext()
    rows, length = shape
    halves = 2 if kind == "block_diffusion" else 1
    length //= halves
    if document_lengths is not None:
        placed = places(length, document_lengths)
        document = placed.document.clamp(max=document_lengths.shape[1] - 1)
        own = document_lengths.gather(1, document).where(placed.inside, 1)
    elif lengths is not None:
        own = lengths[:, None].expand(rows, length)
    else:
        return rotary.fixed(length)
    return rotary.fixed_for_each(own.repeat(1, halves))


@torch.compiler.disable
def base_arguments(
    model,
    input_ids: Tensor,
    *,
    kind: str,
    block_size: int | None = None,
    lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    clean: str = "block_causal",
    reach: int = 0,
) -> dict:
    """Return the arguments of the base model of `model` for int64 ids [B, S] under an attention pattern.

    kind: "full" | "causal" | "block_causal" | "block_diffusion" (input_ids is then x_t ⊕ x_0, and both halves
    carry the positions of one). lengths: int64 [B], valid tokens of right-padded rows (of one half).
    document_lengths: int64 [B, D], zero-filled, the documents of packed rows, each with positions from 0 on.
    clean: for "block_diffusion", the mask of x_0. reach: for "causal", how many tokens ahead a query sees.
    Raises ValueError if the model's layers cannot take such a mask.
    """
    base, length = model.base_model, input_ids.shape[1]
    halves = 2 if kind == "block_diffusion" else 1
    most = learned_positions(base)
    if most is not None:
        longest = length // halves if document_lengths is None else int(document_lengths.max())
        if longest > most:
            raise ValueError(
                f"input_ids has rows of {longest} tokens; {type(model).__name__} has {most} positions"
            )
    pattern = (kind, length // halves, block_size, clean, reach)
    layout = (len(input_ids), first_position(base), input_ids.device)
    with torch.inference_mode(False):  # what is kept serves training, too
        if lengths is None and document_lengths is None:
            seen = _kept_pattern(*pattern, *layout)
        else:
            seen = _pattern(*pattern, *layout, lengths, document_lengths)
        arguments = {"input_ids": input_ids, **mask_arguments(model, *seen)}
    if accepts(type(base), "position_ids"):
        arguments["position_ids"] = seen[2]
    elif kind == "block_diffusion" or document_lengths is not None:
        what = "the block diffusion loss repeats" if kind == "block_diffusion" else "packed rows restart"
        raise ValueError(
            f"{type(base).__name__} takes no position_ids, and {what} positions; train it with mdlm_loss on "
            "rows of one document"
        )
    if accepts(type(base), "use_cache"):
        arguments["use_cache"] = False
    return arguments


def _pattern(
    kind, length, block_size, clean, reach, rows, first, device, lengths=None, document_lengths=None
) -> tuple[SpanMask, Tensor, Tensor]:
    """Return the SpanMask of a pattern, the positions of its tokens, int64 [B or 1, S], and their position
    ids, int64 [B, S], counted from `first`.

    All are computed on the device of the lengths and copied to `device`. For "block_diffusion" S is 2 ·
    length.
    """
    spans = span_mask(kind, length, block_size, lengths, document_lengths, clean, reach)
    positions = copied(places(length, document_lengths).position, device)
    if kind == "block_diffusion":
        positions = positions.repeat(1, 2)
    position_ids = (first + positions).expand(rows, -1)
    return trusted_mask(copied(spans.spans, device), spans.kv_len), positions, position_ids


@functools.lru_cache(maxsize=16)
def _kept_pattern(*pattern) -> tuple[SpanMask, Tensor, Tensor]:
    """Return `_pattern` of rows without padding: one object for all layers and steps."""
    with torch.device("cpu"):
        return _pattern(*pattern)


def span_mask(
    kind, length, block_size=None, lengths=None, document_lengths=None, clean="block_causal", reach=0
) -> SpanMask:
    """Return the SpanMask of an attention kind; for "block_diffusion" `length` is that of one half."""
    options = {
        "full": {},
        "causal": {"reach": reach},
        "block_causal": {"block_size": block_size},
        "block_diffusion": {"block_size": block_size, "clean": clean},
    }
    if kind not in options:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(map(repr, options))}")
    if document_lengths is not None:
        return SpanMask.packed(document_lengths, kind, seq_len=length, **options[kind])
    return getattr(SpanMask, kind)(length, lengths=lengths, **options[kind])


def copied(tensor: Tensor, device) -> Tensor:
    """Return `tensor` on `device`; the host does not wait for copies of its own memory."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def mask_arguments(model, spans: SpanMask, positions: Tensor, position_ids: Tensor | None = None) -> dict:
    """Return the keywords that make every layer of `model` see `spans`, cut to the layer's sliding window.

    positions: int64 [B or 1, S], of queries and keys alike. position_ids: those passed to layers, if
    different. Raises ValueError for layers that no mask reaches and for attention implementations with
    unknown masks.
    """
    base = model.base_model
    windows = layer_windows(base)
    implementation = base.config._attn_implementation
    if implementation == OURS:
        for window in filter(None, windows.values()):  # not every model passes position_ids to its layers
            windowed(spans, positions if position_ids is None else position_ids, window)
        return {"attention_mask": VIEW_ONLY, "dllm_mask": spans}
    if implementation not in _FORMS:
        raise ValueError(
            f"{type(model).__name__} computes attention with {implementation!r}, which takes no such mask; "
            f"allowed: {', '.join(map(repr, _FORMS))}, {OURS!r}. {_REMEDY}"
        )
    form = _FORMS[implementation]
    made = {window: form(spans, positions, window, model.dtype) for window in set(windows.values())}
    if len(made) == 1:
        return {"attention_mask": made.popitem()[1]}
    if not _takes_a_mask_for_each_kind(type(base)):
        raise ValueError(
            f"{type(base).__name__} takes one mask for all layers, and their sliding windows differ: "
            f"{windows}. {_REMEDY}"
        )
    return {"attention_mask": {kind: made[window] for kind, window in windows.items()}}


def layer_windows(base) -> dict[str | None, int | None]:
    """Return the window of each kind of layer: keys with |position(q) - position(k)| < window are seen.

    Kinds are those of config.layer_types; None is all layers of a model without them. A window of
    None is no limit. Raises ValueError for kinds of layers that no mask reaches.
    """
    config = base.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    # The window that a layer passes to its attention. ModernBERT keeps half of it in its config and adds one.
    layers = [module for module in base.modules() if hasattr(module, "sliding_window")]
    if kinds is None:
        windows = {(None, layer.sliding_window) for layer in layers if hasattr(layer, "is_causal")}
        windows = windows or {(None, getattr(config, "sliding_window", None))}
    else:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(
                f"{type(base).__name__} has layers of kind {', '.join(sorted(unknown))}, which see more or "
                "less than a mask says; allowed: full_attention, sliding_attention"
            )
        windows = {
            (kinds[layer.layer_idx], layer.sliding_window)
            for layer in layers
            if hasattr(layer, "is_causal") and kinds[layer.layer_idx] == "sliding_attention"
        }
        if "sliding_attention" in kinds:
            windows = windows or {("sliding_attention", config.sliding_window)}
        if "full_attention" in kinds:
            windows |= {("full_attention", None)}
    if len({kind for kind, _ in windows}) != len(windows):
        raise ValueError(
            f"layers of one kind of {type(base).__name__} have different sliding windows: "
            f"{sorted(windows, key=str)}. {_REMEDY}"
        )
    return dict(windows)


def first_position(base) -> int:
    """Return the number of the first position: RoBERTa and its relatives count from padding token + 1."""
    table = _position_table(base)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def learned_positions(base) -> int | None:
    """Return the number of positions that a model has learned; None if they are computed."""
    table = _position_table(base)
    if table is None:
        return None
    return table.num_embeddings - getattr(table, "offset", first_position(base))


def _position_table(base) -> nn.Embedding | None:
    names = ("position_embeddings", "embed_positions", "wpe")
    tables = (module for name, module in base.named_modules() if name.endswith(names))
    return next((table for table in tables if isinstance(table, nn.Embedding)), None)


# ---- masks in the form of each implementation ------------------------------------------------------------
def dense_mask(spans: SpanMask, positions: Tensor, window: int | None = None) -> Tensor:
    """Return bool [B or 1, 1, S, S]; a padding query sees itself, since softmax needs one key."""
    visible = spans.to_dense()
    if window is not None:
        visible &= (positions[:, :, None] - positions[:, None, :]).abs() < window
    visible |= torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)
    return visible[:, None]


def _boolean(spans, positions, window, dtype):
    return dense_mask(spans, positions, window)


def _additive(spans, positions, window, dtype):
    hidden = ~dense_mask(spans, positions, window)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


def _block_mask(spans, positions, window, dtype):
    """Return a BlockMask, kept with its spans for the other layers and steps."""
    spans = spans if window is None else windowed(spans, positions, window)
    kept = vars(spans)
    if "_block_mask" not in kept:
        kept["_block_mask"] = spans.to_block_mask()
    return kept["_block_mask"]


_FORMS = {"sdpa": _boolean, "eager": _additive, "flex_attention": _block_mask}


# ---- what a class of models takes ------------------------------------------------------------------------
@functools.cache
def accepts(model_class: type, name: str) -> bool:
    """Return whether the forward of a class of models takes the keyword `name`."""
    parameters = inspect.signature(model_class.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@functools.cache
def _takes_a_mask_for_each_kind(model_class: type) -> bool:
    """Return whether the forward takes a dict of masks, as models of transformers with several kinds do."""
    return "dict" in inspect.unwrap(model_class.forward).__code__.co_names
