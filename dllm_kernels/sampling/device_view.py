"""What a step on the device sees: rows of Q queries each, in tensors that a CUDA graph may hold."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm_kernels.block_cache import BlockKVCache
from dllm_kernels.models.attention import within_window
from dllm_kernels.ops.attention import block_attention, cached_block_attention
from dllm_kernels.ops.kv_cache import kv_write_
from dllm_kernels.span_mask import SpanMask


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

    def twice(self) -> DeviceView:
        """The same rows again behind themselves; `table` has both already."""
        once = self.position_ids, self.lengths, self.cache_spans, self.fresh_spans, self.write_positions
        both = (None if tensor is None else torch.cat([tensor, tensor]) for tensor in once)
        return DeviceView(*both, self.table, self.cache)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attention of one layer: query [B, Hq, Q, D], key and value [B, Hkv, Q, D] -> like query."""
        self.layers.add(layer)
        pages = self.cache.keys(layer), self.cache.values(layer)
        if window not in self._seen:
            self._seen[window] = self._whole(window) if self.cache_spans is None else self._spans(window)
        if self.cache_spans is None:
            output = block_attention(query, key, value, self._seen[window], scale=scale)
        else:
            cache_spans, fresh_spans = self._seen[window]
            output = cached_block_attention(
                query, key, value, *pages, self.table, cache_spans, fresh_spans=fresh_spans,
                q_lengths=self.lengths, scale=scale,
            )  # fmt: skip
        if self.write_positions is not None:
            kv_write_(*pages, key, value, self.table, self.write_positions)
        return output

    def _whole(self, window: int | None) -> SpanMask:
        """Every query sees its whole row, in a layer with this sliding window."""
        spans, positions = self._own_row(), self.position_ids
        if window is not None:
            spans = within_window(spans, positions, positions, window)
        return SpanMask(spans, positions.shape[1])

    def _spans(self, window: int | None) -> tuple[Tensor, Tensor | None]:
        """Cached and fresh spans, cut to a layer's sliding window."""
        if window is None:
            return self.cache_spans, self.fresh_spans
        query, fresh = self.position_ids, self.fresh_spans
        key = torch.arange(self.table.shape[1] * self.cache.page_size, device=query.device)[None]
        cached = within_window(self.cache_spans.expand(-1, query.shape[1], -1, -1), query, key, window)
        return cached, within_window(self._own_row() if fresh is None else fresh, query, query, window)

    def _own_row(self) -> Tensor:
        """int32 [B, Q, 1, 2]: from a row's first query to its last."""
        span = torch.stack([torch.zeros_like(self.lengths), self.lengths], dim=-1)
        return span[:, None, None].expand(-1, self.position_ids.shape[1], -1, -1).contiguous()
