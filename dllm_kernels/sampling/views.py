"""The positions that one forward computes, and what they see: `StepView`, and the schemes that make one.

A cache scheme is a row of `SCHEMES`, not a loop of its own: it says which positions of a row are computed.
What is not computed is seen in the cache, and what is computed outside the active block may be kept there.
The rows of a view lie end to end in one sequence of N tokens, so that rows of unequal length cost no padding
in the model's linear layers.

`none`    everything the active block can see is computed, nothing is kept.
`block`   [block-causal] the finished blocks are kept. A forward computes each row from its first position
          that is not cached to the end of its active block: the prompt with the first step, each finished
          block with the first step of the next.
`prefix`  [Fast-dLLM] a refresh computes the whole canvas, as the block's first step, and keeps what stands
          before the block; the steps after it compute the rest.
`dual`    [Fast-dLLM] a refresh keeps what stands on both sides of the block; the steps compute the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels.kv_cache import BlockKVCache
from dllm_kernels.models.attention import within_window
from dllm_kernels.ops.attend_and_write import attend_and_write_
from dllm_kernels.ops.attention import block_attention, cached_attention_plan, cached_block_attention
from dllm_kernels.ops.kv_write import kv_write_
from dllm_kernels.ops.rotate_half import rotate_half
from dllm_kernels.span_mask import SpanMask, trusted_mask


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


@dataclass(eq=False)
class StepView:
    """One forward over `packing`: what it sees, and what it leaves behind.

    block_size: of block-causal attention; None: every token sees its whole row. origin: int64 [B], where
    its blocks count from; None: position 0. Without `pages` only the fresh tokens are seen. With them a
    row's queries also see its cached positions, and fresh keys and values with a position in pages.write are
    written back. layers: those that have attended.
    """

    packing: Packing
    block_size: int | None
    pages: Pages | None = None
    origin: Tensor | None = None
    layers: set[int] = field(default_factory=set)
    _masks: dict[int | None, SpanMask] = field(default_factory=dict)

    @property
    def position_ids(self) -> Tensor:
        """int64 [1, N]"""
        return self.packing.position[None]

    @property
    def cached(self) -> bool:
        """Whether there is a cache, so that not everything that is seen is computed."""
        return self.pages is not None

    @property
    def writes(self) -> bool:
        """Whether a forward over this view changes the cache."""
        return self.pages is not None and self.pages.write is not None

    def tokens_of(self, canvas: Tensor) -> Tensor:
        """Return the ids [1, N] that a forward computes, of canvas [B, T]."""
        return canvas[self.packing.row, self.packing.position][None]

    def place(self, row: Tensor, column: Tensor) -> Tensor:
        """Return where a row's token stands among all that are computed; column: counted from the row's first
        one, which stands for those before it."""
        return self.packing.offset[row] + column.clamp(min=0)

    def rows(self) -> list[tuple[slice, StepView]]:
        """Return where the tokens of each row lie, and a view of that row alone. Of views without pages."""
        packing, views = self.packing, []
        for row, (offset, length) in enumerate(
            zip(packing.offset.tolist(), packing.length.tolist(), strict=True)
        ):
            first = packing.first[row : row + 1]
            alone = Packing.of(first, first + length)
            origin = None if self.origin is None else self.origin[row : row + 1]
            views.append((slice(offset, offset + length), StepView(alone, self.block_size, origin=origin)))
        return views

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None,
        rotation: Rotation = None,
    ) -> Tensor:
        """Attention of one layer: query [1, Hq, N, D], key and value [1, Hkv, N, D] -> like query.

        rotation: cos and sin [1, N, D] by which query and key are rotated first.
        """
        layer = len(self.layers)  # of the cache: a model's own layer may attend more than once
        self.layers.add(layer)
        pages = self.pages
        if pages is not None and not pages.empty:
            return pages.attend(layer, query, key, value, scale, self.mask, window, rotation)
        if rotation is not None:
            query, key = rotate_half(query, key, *rotation)
        output = block_attention(query, key, value, self.mask(window), scale=scale)
        if self.writes:
            kv_write_(*pages.of(layer), pages.rows(key), pages.rows(value), pages.table, pages.write)
        return output

    def mask(self, window: int | None = None) -> SpanMask:
        """Return which of the N fresh tokens each of them sees, in a layer with this sliding window."""
        if window not in self._masks:
            if window is None:
                spans = self._spans()
            else:
                index = torch.arange(len(self.packing.row), device=self.packing.row.device)[None]
                spans = within_window(self.mask().spans, index, index, window)
            self._masks[window] = trusted_mask(spans, len(self.packing.row))
        return self._masks[window]

    def _spans(self) -> Tensor:
        """Return int32 [1, N, 1, 2]: a token's own row, all of it or up to the end of its block."""
        packing = self.packing
        begin = packing.offset[packing.row]
        stop = begin + packing.length[packing.row]
        if self.block_size is not None:
            origin = 0 if self.origin is None else self.origin[packing.row]
            block_end = ((packing.position - origin) // self.block_size + 1) * self.block_size + origin
            stop = torch.minimum(stop, begin + block_end - packing.first[packing.row])
        return torch.stack([begin, stop], dim=-1)[None, :, None].int()


# cos and sin of a layer's queries and keys; None: they are rotated.
Rotation = tuple[Tensor, Tensor] | None


def attend_to_pages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: tuple[Tensor, Tensor],
    table: Tensor,
    cache_spans: Tensor,
    rotation: Rotation,
    write: Tensor | None,
    **options,
) -> Tensor:
    """Attend to cached and fresh keys, and keep those with a position in `write`: a row sees none of these in
    the cache, since it computes them."""
    if rotation is None and write is None:
        return cached_block_attention(query, key, value, *pages, table, cache_spans, **options)
    cos, sin = rotation or (None, None)
    return attend_and_write_(
        query, key, value, *pages, table, cache_spans, cos=cos, sin=sin, positions=write, **options
    )


class Plans:
    """Plans of cached attention, which layers with the same spans and heads share."""

    def __init__(self):
        self._made: dict[tuple, Tensor] = {}

    def of(self, window: int | None, query: Tensor, key: Tensor, *rest: Tensor | None) -> Tensor:
        """Return the plan of a layer; rest: the last arguments of `cached_attention_plan`."""
        kind = window, query.shape, key.shape
        if kind not in self._made:
            self._made[kind] = cached_attention_plan(query, key, *rest)
        return self._made[kind]


@dataclass(eq=False)
class Pages:
    """The cached side of a view: where the rows' pages are, what is seen of them, what is written.

    cache: BlockKVCache; table: int32 [B, P]; seen: int64 [B, R, 2], the cached positions that are seen, as
    spans; write: int32 [B, Tq], the position of each fresh token whose keys and values are kept, else -1;
    None: none are. Tq is the longest row. own_block: whether some fresh token sees less than its whole row.
    """

    cache: object
    table: Tensor
    seen: Tensor
    packing: Packing
    write: Tensor | None
    own_block: bool

    def __post_init__(self) -> None:
        length = self.packing.length
        self.longest = int(length.max())
        self.alone = len(length) == 1
        self.even = bool((length == self.longest).all())
        self.empty = not bool((self.seen[..., 0] < self.seen[..., 1]).any())
        self.column = torch.arange(self.longest, device=length.device)
        self.real = self.column < length[:, None]
        self.unpack = (self.packing.offset[:, None] + self.column).masked_fill(~self.real, 0)
        self.lengths = None if self.even else length.int()
        self._spans: dict[int | None, tuple[Tensor, Tensor | None]] = {}
        self._plans = Plans()
        self._rotation: tuple[Tensor, ...] | None = None  # cos and sin as they came, and by rows

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Cached keys and values of a layer."""
        return self.cache.keys(layer), self.cache.values(layer)

    def attend(
        self, layer, query, key, value, scale, mask: Callable[..., SpanMask], window, rotation
    ) -> Tensor:
        """Do as StepView.attend, over cached and fresh keys."""
        if window not in self._spans:
            all_fresh = window is None and not self.own_block
            fresh = None if all_fresh else self._fresh_spans(mask(window))
            self._spans[window] = self._cache_spans(window), fresh
        cache_spans, fresh_spans = self._spans[window]
        query, key, value, pages = self.rows(query), self.rows(key), self.rows(value), self.of(layer)
        plan = self._plans.of(window, query, key, pages[0], self.table, cache_spans, self.lengths)
        output = attend_to_pages(
            query, key, value, pages, self.table, cache_spans, self._rows_of(rotation), self.write,
            fresh_spans=fresh_spans, q_lengths=self.lengths, scale=scale, plan=plan,
        )  # fmt: skip
        return output if self.alone else self.packed(output)

    def _rows_of(self, rotation: Rotation) -> Rotation:
        """Return cos and sin [B, Tq, D], which layers share."""
        if rotation is None or self.alone:
            return rotation
        if self._rotation is None or self._rotation[0] is not rotation[0]:
            self._rotation = *rotation, *(self.rows(angles[:, None])[:, 0] for angles in rotation)
        return self._rotation[2:]

    def packed(self, tokens: Tensor) -> Tensor:
        """[B, H, Tq, D] -> [1, H, N, D]"""
        tokens = tokens.transpose(1, 2)
        tokens = tokens.flatten(0, 1) if self.even else tokens[self.real]
        return tokens.transpose(0, 1)[None]

    def rows(self, tokens: Tensor) -> Tensor:
        """[1, H, N, D] -> [B, H, Tq, D]; short rows are filled up with any token."""
        if self.alone:
            return tokens
        tokens = tokens[0].transpose(0, 1)
        tokens = tokens.view(-1, self.longest, *tokens.shape[1:]) if self.even else tokens[self.unpack]
        return tokens.transpose(1, 2)

    def _cache_spans(self, window: int | None) -> Tensor:
        """Return int32 [B, 1 or Tq, R, 2], the cached positions that each query sees."""
        spans = self.seen[:, None].int()
        if window is None:
            return spans
        query = self.packing.first[:, None] + self.column
        key = torch.arange(int(self.seen.max()), device=query.device)[None]
        return within_window(spans.expand(-1, self.longest, -1, -1), query, key, window)

    def _fresh_spans(self, mask: SpanMask) -> Tensor:
        """Return int32 [B, Tq, R, 2], `mask` over the N tokens, counted from each row's own first one."""
        spans = mask.spans[0][self.unpack] - self.packing.offset.int()[:, None, None, None]
        return spans.masked_fill(~self.real[..., None, None] | (spans < 0), 0)


class Rows(NamedTuple):
    """Positions of rows; all [B], int64 positions but for `stale`.

    start, end: the active block; reach: end of what is computed and seen at all; cached: leading positions
    whose keys and values are final and in pages; stale: bool, whether approximate ones are to be renewed;
    origin: where block-causal blocks count from.
    """

    start: Tensor
    end: Tensor
    reach: Tensor
    cached: Tensor
    stale: Tensor
    origin: Tensor

    def twice(self) -> Rows:
        """The same rows again behind themselves."""
        return Rows(*(torch.cat([field, field]) for field in self))


@dataclass(frozen=True)
class Scheme:
    """A cache scheme. computed: the positions first[b] .. last[b]-1 that a forward computes. keeps: those of
    them outside the active block that it leaves in the cache: none, those "before" it, or those "around" it.
    exact: whether what is kept equals what a forward over everything would compute.
    """

    computed: Callable[[Rows], tuple[Tensor, Tensor]]
    keeps: str | None = None
    exact: bool = True


SCHEMES = {
    "none": Scheme(lambda rows: (torch.zeros_like(rows.start), rows.reach)),
    "block": Scheme(lambda rows: (rows.cached, rows.end), keeps="before"),
    "prefix": Scheme(
        lambda rows: (rows.start.masked_fill(rows.stale, 0), rows.reach), keeps="before", exact=False
    ),
    "dual": Scheme(
        lambda rows: (
            rows.start.masked_fill(rows.stale, 0),
            torch.where(rows.stale, rows.reach, rows.end),
        ),
        keeps="around",
        exact=False,
    ),
}


def view_of(
    scheme: Scheme, rows: Rows, block_size: int | None, cache=None, table: Tensor | None = None
) -> StepView:
    """Return the next forward over `rows`. block_size: of block-causal attention; None: bidirectional.

    cache, table: the pages of a scheme that keeps anything.
    """
    first, last = scheme.computed(rows)
    packing = Packing.of(first, last)
    if scheme.keeps is None:
        return StepView(packing, block_size, origin=rows.origin)
    column = first[:, None] + torch.arange(int(packing.length.max()), device=first.device)
    kept = column < rows.start[:, None]
    if scheme.keeps == "around":
        kept |= (column >= rows.end[:, None]) & (column < last[:, None])
    write = column.masked_fill(~kept, -1).int() if bool(kept.any()) else None
    before = torch.stack([torch.zeros_like(first), first], dim=-1)
    after = torch.stack([last, rows.reach], dim=-1)
    seen = torch.stack([before, after], dim=1) if scheme.keeps == "around" else before[:, None]
    seen = seen.masked_fill((seen[..., :1] >= seen[..., 1:]), 0)
    own_block = block_size is not None and write is not None
    pages = Pages(cache, table, seen, packing, write, own_block)
    return StepView(packing, block_size, pages, rows.origin)


# ---- views on the device ----------------------------------------------------------------------------------
# What a step on the device sees: rows of Q queries each, in tensors that a CUDA graph may hold.


@dataclass(eq=False)
class DeviceView:
    """A forward over B rows, all int32: to a model a view as views.StepView is, which never looks at what
    its tensors hold.

    position_ids: [B, Q]; of them the first lengths[b] count. cache_spans: [B, 1, R, 2], the cached positions
    that are seen; None: none are. fresh_spans: [B, Q, 1, 2], which queries of its row each one sees; None:
    all. write_positions: [B, Q], where keys and values are left in the pages, -1 for nowhere; None: none are.
    table: [B, P]. layers: those that have attended.
    """

    position_ids: Tensor
    lengths: Tensor
    cache_spans: Tensor | None
    fresh_spans: Tensor | None
    write_positions: Tensor | None
    table: Tensor
    cache: BlockKVCache
    layers: set[int] = field(default_factory=set)
    _seen: dict[int | None, tuple] = field(default_factory=dict)
    _plans: Plans = field(default_factory=Plans)

    @property
    def cached(self) -> bool:
        """Whether there is a cache: always."""
        return True

    def tokens_of(self, canvas: Tensor) -> Tensor:
        """Return the ids [B, Q] that a forward computes, of canvas [B, T]."""
        return canvas.gather(1, self.position_ids.long())

    def place(self, row: Tensor, column: Tensor) -> Tensor:
        """Do as StepView.place; the last token stands for those behind it."""
        queries = self.position_ids.shape[1]
        return row * queries + column.clamp(0, queries - 1)

    def twice(self) -> DeviceView:
        """The same rows again behind themselves; `table` has both already."""
        once = self.position_ids, self.lengths, self.cache_spans, self.fresh_spans, self.write_positions
        both = (None if tensor is None else torch.cat([tensor, tensor]) for tensor in once)
        return DeviceView(*both, self.table, self.cache)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None,
        rotation: Rotation = None,
    ) -> Tensor:
        """Attention of one layer: query [B, Hq, Q, D], key and value [B, Hkv, Q, D] -> like query; rotation:
        cos and sin [B, Q, D] by which query and key are rotated first."""
        layer = len(self.layers)  # of the cache: a model's own layer may attend more than once
        self.layers.add(layer)
        pages = self.cache.keys(layer), self.cache.values(layer)
        if window not in self._seen:
            self._seen[window] = self._whole(window) if self.cache_spans is None else self._spans(window)
        if self.cache_spans is not None:
            cache_spans, fresh_spans = self._seen[window]
            plan = self._plans.of(window, query, key, pages[0], self.table, cache_spans, self.lengths)
            return attend_to_pages(
                query, key, value, pages, self.table, cache_spans, rotation, self.write_positions,
                fresh_spans=fresh_spans, q_lengths=self.lengths, scale=scale, plan=plan,
            )  # fmt: skip
        if rotation is not None:
            query, key = rotate_half(query, key, *rotation)
        output = block_attention(query, key, value, self._seen[window], scale=scale)
        if self.write_positions is not None:
            kv_write_(*pages, key, value, self.table, self.write_positions)
        return output

    def _whole(self, window: int | None) -> SpanMask:
        """Every query sees its whole row, in a layer with this sliding window."""
        spans, positions = self._own_row(), self.position_ids
        if window is not None:
            spans = within_window(spans, positions, positions, window)
        return trusted_mask(spans, positions.shape[1])

    def _spans(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        """Cached and fresh spans, cut to a layer's sliding window."""
        if window is None:
            return self.cache_spans, self.fresh_spans
        query, fresh = self.position_ids, self.fresh_spans
        key = torch.arange(self.table.shape[1] * self.cache.page_size, device=query.device)[None]
        cached = within_window(self.cache_spans.expand(-1, query.shape[1], -1, -1), query, key, window)
        return cached, within_window(self._own_row() if fresh is None else fresh, query, query, window)

    def _own_row(self) -> Tensor:
        """Return int32 [B, Q, 1, 2]: from a row's first query to its last."""
        span = torch.stack([torch.zeros_like(self.lengths), self.lengths], dim=-1)
        return span[:, None, None].expand(-1, self.position_ids.shape[1], -1, -1).contiguous()
