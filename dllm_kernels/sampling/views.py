"""Which positions one forward computes, and what they see: `StepView`, and the ways to make one.

A cache scheme is a way to make a view, not a loop of its own. The rows of a view lie end to end in one
sequence of N tokens, so that rows of unequal length cost no padding in the model's linear layers.

`none`   every position that the active block can see is computed, nothing is kept.
`block`  keys and values of finished blocks are kept in pages. A forward computes each row from its first
         position that is not cached to the end of its active block, and writes what is final: the prompt
         with the first step, each finished block with the first step of the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm_kernels.models.attention import within_window
from dllm_kernels.ops.attention import block_attention, cached_block_attention
from dllm_kernels.ops.kv_cache import kv_write_
from dllm_kernels.span_mask import SpanMask


@dataclass(frozen=True)
class Packing:
    """B rows of unequal length, end to end in one sequence of N tokens.

    first, length, offset: int64 [B], each row's first position, number of tokens, place of its first token;
    row, position: int64 [N], each token's row and its position in that row's sequence.
    """

    first: Tensor
    length: Tensor
    offset: Tensor
    row: Tensor
    position: Tensor

    @staticmethod
    def of(first: Tensor, last: Tensor) -> Packing:
        """Positions first[b] .. last[b]-1 of every row."""
        length = last - first
        offset = length.cumsum(0) - length
        row = torch.arange(len(first), device=first.device).repeat_interleave(length)
        position = torch.arange(len(row), device=first.device) + (first - offset)[row]
        return Packing(first, length, offset, row, position)

    def place(self, row: Tensor, position: Tensor) -> Tensor:
        """Where the token of `row` at `position` lies in the sequence."""
        return self.offset[row] + position - self.first[row]


@dataclass(eq=False)
class StepView:
    """What one forward over `packing` sees, and what it leaves behind.

    block_size: of block-causal attention; None: every token sees its whole row. Without `pages` only the
    fresh tokens are seen. With them a row's queries also see its cached positions, and fresh keys and values
    with a position in pages.write are written back. layers: those that have attended.
    """

    packing: Packing
    block_size: int | None
    pages: Pages | None = None
    layers: set[int] = field(default_factory=set)
    _masks: dict[int | None, SpanMask] = field(default_factory=dict)

    @property
    def position_ids(self) -> Tensor:
        """int64 [1, N]"""
        return self.packing.position[None]

    @property
    def writes(self) -> bool:
        """Whether a forward over this view changes the cache."""
        return self.pages is not None and self.pages.write is not None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attention of one layer: query [1, Hq, N, D], key and value [1, Hkv, N, D] -> like query."""
        self.layers.add(layer)
        pages = self.pages
        if pages is None or pages.empty:
            output = block_attention(query, key, value, self.mask(window), scale=scale)
        else:
            output = pages.attend(layer, query, key, value, scale, self.mask, window)
        if self.writes:
            kv_write_(*pages.of(layer), pages.rows(key), pages.rows(value), pages.table, pages.write)
        return output

    def mask(self, window: int | None = None) -> SpanMask:
        """Which of the N fresh tokens each of them sees, in a layer with this sliding window."""
        if window not in self._masks:
            if window is None:
                spans = self._spans()
            else:
                index = torch.arange(len(self.packing.row), device=self.packing.row.device)[None]
                spans = within_window(self.mask().spans, index, index, window)
            self._masks[window] = SpanMask(spans, len(self.packing.row))
        return self._masks[window]

    def _spans(self) -> Tensor:
        """int32 [1, N, 1, 2]: a token's own row, all of it or up to the end of its block."""
        packing = self.packing
        begin = packing.offset[packing.row]
        stop = begin + packing.length[packing.row]
        if self.block_size is not None:
            block_end = (packing.position // self.block_size + 1) * self.block_size
            stop = torch.minimum(stop, begin + block_end - packing.first[packing.row])
        return torch.stack([begin, stop], dim=-1)[None, :, None].int()


@dataclass(eq=False)
class Pages:
    """The cached side of a view: where the rows' pages are, what is seen of them, what is written.

    cache: BlockKVCache; table: int32 [B, P]; cached: int64 [B], positions 0..cached-1 are seen; write: int32
    [B, Tq], the position of each fresh token that is final, else -1; None: none is. Tq is the longest row.
    """

    cache: object
    table: Tensor
    cached: Tensor
    packing: Packing
    write: Tensor | None

    def __post_init__(self) -> None:
        length = self.packing.length
        self.longest = int(length.max())
        self.even = bool((length == self.longest).all())
        self.empty = not bool(self.cached.any())
        column = torch.arange(self.longest, device=length.device)
        self.real = column < length[:, None]
        self.unpack = (self.packing.offset[:, None] + column).masked_fill(~self.real, 0)
        self.lengths = None if self.even else length.int()
        self._spans: dict[int | None, tuple[Tensor, Tensor | None]] = {}

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Cached keys and values of a layer."""
        return self.cache.keys(layer), self.cache.values(layer)

    def attend(self, layer, query, key, value, scale, mask: Callable[..., SpanMask], window) -> Tensor:
        """As StepView.attend, over cached and fresh keys."""
        if window not in self._spans:
            one_block = self.write is None and window is None
            fresh = None if one_block else self._fresh_spans(mask(window))
            self._spans[window] = self._cache_spans(window), fresh
        cache_spans, fresh_spans = self._spans[window]
        output = cached_block_attention(
            self.rows(query), self.rows(key), self.rows(value), *self.of(layer), self.table, cache_spans,
            fresh_spans=fresh_spans, q_lengths=self.lengths, scale=scale,
        )  # fmt: skip
        tokens = output.transpose(1, 2)
        tokens = tokens.flatten(0, 1) if self.even else tokens[self.real]
        return tokens.transpose(0, 1)[None]

    def rows(self, tokens: Tensor) -> Tensor:
        """[1, H, N, D] -> [B, H, Tq, D]; short rows are filled up with any token."""
        tokens = tokens[0].transpose(0, 1)
        tokens = tokens.view(-1, self.longest, *tokens.shape[1:]) if self.even else tokens[self.unpack]
        return tokens.transpose(1, 2)

    def _cache_spans(self, window: int | None) -> Tensor:
        """int32 [B, 1 or Tq, 1, 2]: the cached positions that each query sees."""
        end = self.cached[:, None]
        if window is None:
            start = torch.zeros_like(end)
        else:
            position = self.packing.first[:, None] + torch.arange(self.longest, device=end.device)
            start = (position - window + 1).clamp(min=0)
            end = end.expand_as(start)
        spans = torch.stack([start, end], dim=-1).masked_fill((start >= end)[..., None], 0)
        return spans[:, :, None].int()

    def _fresh_spans(self, mask: SpanMask) -> Tensor:
        """int32 [B, Tq, R, 2]: `mask` over the N tokens, counted from each row's own first one."""
        spans = mask.spans[0][self.unpack] - self.packing.offset.int()[:, None, None, None]
        return spans.masked_fill(~self.real[..., None, None] | (spans < 0), 0)


def view_of_canvas(end: Tensor, canvas_end: Tensor, block_size: int | None) -> StepView:
    """The `none` view: rows [B] with the end of their active block and of their canvas.

    block_size None: bidirectional, the whole canvas. Else block-causal, up to the active block's end, since
    nothing before it sees what comes after.
    """
    last = canvas_end if block_size is None else end
    return StepView(Packing.of(torch.zeros_like(last), last), block_size)


def view_of_blocks(
    start: Tensor, end: Tensor, cached: Tensor, block_size: int, cache, table: Tensor
) -> StepView:
    """The `block` view: rows [B] with their active block [start, end) and the number of cached positions."""
    packing = Packing.of(cached, end)
    write = None
    if bool((cached < start).any()):
        column = cached[:, None] + torch.arange(int(packing.length.max()), device=start.device)
        write = column.masked_fill(column >= start[:, None], -1).int()
    return StepView(packing, block_size, Pages(cache, table, cached, packing, write))
