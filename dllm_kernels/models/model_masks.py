"""The masks that transformers models make themselves, if a caller passes neither a view nor a SpanMask.

transformers asks the mask interface of a model's attention implementation what its queries see. This module
registers:
- for "dllm", masks as spans: int32 [B or 1, 1, Sq, R, 2] in place of a dense [B, 1, Sq, Sk];
- for every implementation, the mask that a diffusion model was trained with. A config whose "diffusion" entry
  says "bidirectional" or "block_causal" gets that mask where transformers would make a causal one. Blocks
  count from a row's first real token. `is_causal=True`, in a call or in the config, asks for the causal mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)

from dllm_kernels.span_mask import SpanMask, trusted_mask

NAME = "dllm"

# Stands for spans where a diffusion model would make a mask for which its training says nothing: nothing is
# wrong as long as the forward attends by a view or a SpanMask.
UNKNOWN_PATTERN = torch.empty(0, 0, 0, 0, 0, device="cpu")


@dataclass(frozen=True)
class Pattern:
    """The keys that the query at position q of a row sees, apart from padding.

    kind: "causal", keys up to q; "bidirectional", all; "block_causal", keys up to the end of q's block, where
    blocks count from the row's first real token. reach: how far from q a key may lie; None: any distance.
    """

    kind: str
    block_size: int = 1
    reach: int | None = None

    def spans(self, first: Tensor, last: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return start and end of the positions that each query sees, int64 [B or 1, Sq].

        query: int64 [1, Sq], positions. first, last: int64 [B or 1, 1 or Sq], the first position that a query
        can see at all, where its blocks count from, and the one after the last.
        """
        start, end = torch.broadcast_tensors(first, last, query)[:2]
        if self.kind == "causal":
            end = torch.minimum(end, query + 1)
        elif self.kind == "block_causal":
            block = (query - first).div(self.block_size, rounding_mode="floor")
            end = torch.minimum(end, first + (block + 1) * self.block_size)
        if self.reach is not None:
            start = torch.maximum(start, query - self.reach)
            end = torch.minimum(end, query + self.reach + 1)
        return start, end


@dataclass(frozen=True)
class MaskRequest:
    """The arguments that transformers passes to a mask interface for one forward, named as in its
    `masking_utils.sdpa_mask`."""

    batch_size: int
    q_length: int
    kv_length: int
    mask_function: Callable
    q_offset: int | Tensor = 0
    kv_offset: int = 0
    attention_mask: Tensor | None = None
    local_size: int | None = None
    config: object = None
    use_vmap: bool = False
    device: object = None
    bidirectional: bool = False

    @staticmethod
    def of(arguments: dict) -> MaskRequest:
        """Make a request from an interface's arguments; only bidirectional masks may be skipped."""
        known = {name: arguments[name] for name in MaskRequest.__dataclass_fields__ if name in arguments}
        return MaskRequest(**known, bidirectional="allow_is_bidirectional_skip" in arguments)

    def check_padding(self) -> None:
        """Raise ValueError for padding of another size than the batch."""
        mask = self.attention_mask
        if mask is None:
            return
        tokens = self.q_length + self.q_offset if isinstance(self.q_offset, int) else self.q_length
        if mask.dim() != 2 or mask.shape[0] not in (1, self.batch_size) or mask.shape[1] < tokens:
            raise ValueError(
                f"attention_mask is {list(mask.shape)}; allowed: [{self.batch_size}, {tokens}], or "
                f"[{self.batch_size}, 1, {self.q_length}, {self.kv_length}] for a mask of queries and keys"
            )

    def own_pattern(self) -> Pattern | None:
        """Return the pattern of transformers; None if only a dense mask tells."""
        if self.mask_function is causal_mask_function:
            return Pattern("causal")
        return Pattern("bidirectional") if self.mask_function is bidirectional_mask_function else None

    def trained_pattern(self) -> Pattern | None:
        """Return the pattern of a diffusion model's training; None for masks of images, for chunks that
        are no whole blocks or lie in a cache, and if the block size is not known.

        Windows of decoders reach |q - k| < config.sliding_window, as their attention functions count them.
        Encoders, whose masks are bidirectional without `is_causal=False`, count in the key itself.
        """
        kind, block_size = trained_kind(self.config)
        if self.use_vmap or block_size is None:
            return None
        if self._is_chunked():
            whole = self.local_size % block_size == 0 and self.q_length == self.kv_length
            return Pattern(kind, block_size) if whole else None
        encoder = self.bidirectional and getattr(self.config, "is_causal", None) is not False
        reach = None if self.local_size is None else self.local_size - (not encoder)
        return Pattern(kind, block_size, reach)

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """Return first and last + 1 of the positions that queries can see at all, int64 [B or 1, 1 or Sq].

        They are a row's unpadded tokens, restricted to a query's document if position ids show several,
        or to its chunk. None for padding with holes, and for any padding in compiled code, which cannot read
        it.
        """
        length = self.kv_length + self.kv_offset
        start = self.first_real()
        if self.attention_mask is None:
            return self.within_documents(start, start + length)
        if torch.compiler.is_compiling():
            return None
        real = pad(self.attention_mask.bool(), (0, max(length - self.attention_mask.shape[1], 0)))[:, :length]
        end = start + real.sum(1, keepdim=True)
        index = torch.arange(length, device=real.device)
        whole = (index >= start) & (index < end)
        return self.within_documents(start, end) if torch.equal(whole, real) else None

    def within_documents(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Return bounds, int64 [B or 1, 1], cut to each query's document or chunk, [B or 1, 1 or Sq]."""
        plain = self.mask_function in (causal_mask_function, bidirectional_mask_function)
        may_be_packed = self.attention_mask is None or self._is_chunked()
        if plain or self.bidirectional or self.q_length != self.kv_length or not may_be_packed:
            return start, end
        first, last = self._documents()
        return torch.maximum(start, first), torch.minimum(end, last)

    def first_real(self) -> Tensor:
        """Return int64 [B, 1], each row's first unpadded position; [1, 1] without padding."""
        if self.attention_mask is None:
            return torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        return self.attention_mask.bool().int().argmax(1, keepdim=True)

    def query(self) -> Tensor:
        """Return int64 [1, Sq], positions of the queries."""
        return (torch.arange(self.q_length, device=self.device) + self.q_offset)[None]

    def _is_chunked(self) -> bool:
        return self.local_size is not None and getattr(self.config, "attention_chunk_size", None) is not None

    def _documents(self) -> tuple[Tensor, Tensor]:
        """Return int64 [B, S], where each query's document or chunk starts and ends: in causal masks a token
        sees the previous one unless that ends another one."""
        index = torch.arange(self.q_length, device=self.device)
        row = torch.arange(self.batch_size, device=self.device)[:, None]
        seen = self.mask_function(row, torch.zeros_like(row), index[None, 1:], index[None, :-1])
        begins = pad(~seen.expand(self.batch_size, -1), (1, 0), value=True)
        start = torch.where(begins, index, 0).cummax(1).values
        follows = torch.where(begins, index, self.q_length)[:, 1:].flip(1).cummin(1).values.flip(1)
        return start, pad(follows, (0, 1), value=self.q_length)


def span_mask_interface(**arguments) -> Tensor:
    """Return the mask of one forward as spans of key indices, int32 [B or 1, 1, Sq, R, 2]."""
    given = arguments.get("attention_mask")
    if given is not None and given.dim() == 5:
        return given  # made by an earlier call: `generate` makes masks for static caches before the forward
    request = MaskRequest.of(arguments)
    request.check_padding()
    if trained_kind(request.config) is None:
        pattern = request.own_pattern()
        bounds = None if pattern is None else request.bounds()
    else:
        pattern = request.trained_pattern()
        if pattern is None:
            return UNKNOWN_PATTERN
        bounds = request.bounds()
    if bounds is None:
        dense = sdpa_mask(
            batch_size=request.batch_size, q_length=request.q_length, kv_length=request.kv_length,
            mask_function=request.mask_function if pattern is None else _function(pattern, request),
            q_offset=request.q_offset, kv_offset=request.kv_offset, attention_mask=request.attention_mask,
            use_vmap=request.use_vmap, device=request.device, allow_is_causal_skip=False,
        )  # fmt: skip
        return torch.ops.dllm_kernels.spans_of_dense(dense[:, 0])[:, None]
    start, end = (
        (bound - request.kv_offset).clamp(0, request.kv_length)
        for bound in pattern.spans(*bounds, request.query())
    )
    spans = torch.stack([start, end], dim=-1).masked_fill((start >= end)[..., None], 0)
    return spans.int()[:, None, :, None]


def trained_kind(config) -> tuple[str, int | None] | None:
    """Return ("bidirectional", 1) or ("block_causal", block size or None), the first kind in the config's
    "diffusion" entry; None without such an entry, or if the config asks for a causal mask."""
    entry = getattr(config, "diffusion", None)
    if not isinstance(entry, Mapping) or not entry.get("attention") or getattr(config, "is_causal", None):
        return None
    kind, size = entry["attention"][0], entry.get("block_size")
    if kind == "bidirectional":
        return kind, 1
    if kind == "block_causal" and (size is None or (type(size) is int and size > 0)):
        return kind, size
    raise ValueError(
        f'config.diffusion is {dict(entry)!r}; its "attention" must list "bidirectional" or "block_causal", '
        'the latter with a "block_size" of at least 1'
    )


def _function(pattern: Pattern, request: MaskRequest) -> Callable[..., Tensor]:
    """Return `pattern` as a mask function of transformers, which adds the padding."""
    bounds = request.bounds()
    if bounds is None:
        end = torch.tensor([[request.kv_length + request.kv_offset]], device=request.device)
        bounds = request.within_documents(request.first_real(), end)
    start, end = pattern.spans(*bounds, request.query())

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = batch.clamp(max=len(start) - 1)
        index = query - request.q_offset
        return (start[row, index] <= key) & (key < end[row, index])

    return visible


_library = torch.library.Library("dllm_kernels", "FRAGMENT")
_library.define("spans_of_dense(Tensor visible) -> Tensor")


@torch.library.impl(_library, "spans_of_dense", "CompositeExplicitAutograd")
def _spans_of_dense(visible: Tensor) -> Tensor:
    """Convert bool [B, Sq, Sk] -> int32 [B, Sq, R, 2]; an operator, since compiled code cannot know R."""
    return SpanMask.from_dense(visible).spans


@torch.library.register_fake("dllm_kernels::spans_of_dense", lib=_library)
def _(visible: Tensor) -> Tensor:
    ranges = torch.library.get_ctx().new_dynamic_size(min=1)
    return visible.new_empty(*visible.shape[:2], ranges, 2, dtype=torch.int32)


# ---- masks that a caller gives -----------------------------------------------------------------------------
def spans_of_4d(mask: Tensor, keys: int) -> Tensor:
    """Return the first `keys` columns of a boolean (True = visible) or additive (0 or -inf) mask
    [B, 1, Sq, >= keys] as spans, int32 [B, Sq, R, 2].

    All layers of a forward get the same mask: its spans are kept with it until its contents change. On a GPU,
    where a comparison would wait for the device, torch's count of changes tells.
    """
    if torch.compiler.is_compiling():
        return torch.ops.dllm_kernels.spans_of_dense(_visible(mask, keys))
    counted = mask.is_cuda and not mask.is_inference()
    kept = getattr(mask, "_dllm_spans", None)
    if kept is None or kept[0] != keys or not _same(kept[1], mask._version if counted else mask):
        spans = torch.ops.dllm_kernels.spans_of_dense(_visible(mask, keys))
        kept = mask._dllm_spans = keys, mask._version if counted else mask.clone(), spans
    return kept[2]


def _same(before: Tensor | int, now: Tensor | int) -> bool:
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        return torch.equal(before, now)
    return type(before) is type(now) and before == now


def _visible(mask: Tensor, keys: int) -> Tensor:
    """Return the mask as bool [B, Sq, keys]."""
    if mask.shape[1] != 1:
        raise ValueError(f"attention_mask is {list(mask.shape)}; a mask per head cannot be kept as spans")
    visible = mask[:, 0, :, :keys]
    if visible.dtype == torch.bool:
        return visible
    if not visible.is_floating_point():
        raise ValueError(
            f"attention_mask is {visible.dtype} {list(mask.shape)}; a 4-D mask must be bool (True = visible) "
            "or hold 0 and -inf in a floating point dtype"
        )
    hidden = visible < 0.5 * torch.finfo(visible.dtype).min
    if not torch.compiler.is_compiling() and not (hidden | (visible == 0)).all():
        raise ValueError(
            "attention_mask adds values other than 0 and -inf: a bias cannot be kept as spans; "
            "run this model with its own attention"
        )
    return ~hidden


# ---- registration ------------------------------------------------------------------------------------------
def _as_trained(make_mask: Callable) -> Callable:
    """Extend `make_mask`, of another attention implementation, to diffusion models."""

    @wraps(make_mask)
    def mask(**arguments):
        request = MaskRequest.of(arguments)
        kind = trained_kind(request.config)
        if kind is None or (
            request.bidirectional and kind[0] == "bidirectional" and request.local_size is None
        ):
            return make_mask(**arguments)
        request.check_padding()
        pattern = request.trained_pattern()
        if pattern is None:
            raise ValueError(unknown_pattern(request.config.model_type))
        if make_mask is flash_attention_mask:
            if not request.bidirectional or pattern.kind != "bidirectional":
                raise ValueError(
                    f"{request.config._attn_implementation} has no {pattern.kind} mask, with which this "
                    f'{request.config.model_type} model was trained: model.set_attn_implementation("dllm")'
                )
            return make_mask(**arguments)  # its kernels count windows as `trained_pattern` does
        if make_mask is flex_attention_mask:
            return trusted_mask(span_mask_interface(**arguments)[:, 0], request.kv_length).to_block_mask()
        arguments |= dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return make_mask(**{**arguments, "mask_function": _function(pattern, request)})

    return mask


def unknown_pattern(what: str) -> str:
    """Return the error text for a diffusion model whose mask its training does not describe."""
    return (
        f"{what} makes a mask for which its diffusion training says nothing: of images, of chunks that are "
        'no whole blocks or lie in a cache, or of blocks without a "block_size" in config.diffusion. Give '
        "the mask as dllm_mask=dk.SpanMask(...) under dk.enable_attention, or as a 4-D attention_mask"
    )


def _register() -> None:
    for name, make_mask in AttentionMaskInterface().items():
        AttentionMaskInterface.register(name, _as_trained(make_mask))
    AttentionMaskInterface.register(NAME, span_mask_interface)


_register()
