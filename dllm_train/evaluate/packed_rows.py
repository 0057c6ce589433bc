"""Lay rows end to end in one sequence, with a mask for each token.

A row of a bidirectional model is a whole request. A row of a block-causal model is one block, which also sees
the clean tokens before it. These stand once, before all rows that share them:

    clean x_0 of request 1 | its noised blocks, any number of each | clean x_0 of request 2 | ...

So there is no padding, and keys and values of a prefix are computed once for all samples and blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dllm_kernels.models.attention import within_window
from dllm_kernels.ops.attention import block_attention
from dllm_kernels.span_mask import SpanMask, trusted_mask


@dataclass(eq=False)
class Part:
    """Rows that share clean tokens.

    clean: int64 [C], whole blocks from position 0. rows: (ids int64 [W], first position), each of which sees
    the clean tokens before its first position.
    """

    clean: np.ndarray
    rows: list[tuple[np.ndarray, int]]


@dataclass(eq=False)
class PackedRows:
    """The tokens of one forward, N of them, as a view that attends (see `StepView`).

    ids, position_ids: int64 [1, N]. spans: int32 [1, N, R, 2], the tokens that each of them sees.
    row_offset: int64, where each row begins. before: int64, the index of the clean token before each row, or
    of its own first one.
    layers: those that have attended.
    """

    ids: Tensor
    position_ids: Tensor
    spans: Tensor
    row_offset: np.ndarray
    before: np.ndarray
    layers: set[int] = field(default_factory=set)
    _masks: dict[int | None, SpanMask] = field(default_factory=dict)

    @staticmethod
    def of(parts: Sequence[Part], block_size: int | None, device: torch.device) -> PackedRows:
        """Pack `parts`. block_size: of block-causal attention among clean tokens; None: there are none."""
        pieces, first, is_clean, prefix, offset = [], [], [], [], 0
        for part in parts:
            clean_offset = offset
            clean = [(part.clean, 0)] if len(part.clean) else []
            for index, (ids, start) in enumerate(clean + part.rows):
                pieces.append(ids)
                first.append(start)
                is_clean.append(index < len(clean))
                prefix.append((clean_offset, start))
                offset += len(ids)
        length, first = np.array([len(ids) for ids in pieces]), np.array(first)
        is_clean, prefix = np.array(is_clean), np.array(prefix)
        begin = length.cumsum() - length
        position = np.arange(offset) - np.repeat(begin - first, length)
        own = np.stack([np.repeat(begin, length), np.repeat(begin + length, length)], axis=1)
        if block_size is not None:
            block_end = own[:, 0] + (position // block_size + 1) * block_size
            own[:, 1] = np.where(np.repeat(is_clean, length), np.minimum(own[:, 1], block_end), own[:, 1])
        spans = own[:, None]
        if (first > 0).any():
            seen = np.repeat(np.stack([prefix[:, 0], prefix.sum(1)], axis=1), length, axis=0)
            sees = np.repeat(first > 0, length)[:, None, None]
            spans = np.where(sees, np.stack([seen, own], axis=1), np.stack([own, np.zeros_like(own)], axis=1))
        before = np.where(first > 0, prefix.sum(1) - 1, begin)
        return PackedRows(
            torch.from_numpy(np.concatenate(pieces)[None]).to(device),
            torch.from_numpy(position[None]).to(device),
            torch.from_numpy(spans[None].astype(np.int32)).to(device),
            begin[~is_clean],
            before[~is_clean],
        )

    def mask(self, window: int | None = None) -> SpanMask:
        """Return the mask of a layer with this sliding window."""
        if window not in self._masks:
            spans = self.spans
            if window is not None:
                spans = within_window(spans, self.position_ids, self.position_ids, window)
            self._masks[window] = trusted_mask(spans, self.ids.shape[1])
        return self._masks[window]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attend in one layer: query [1, Hq, N, D], key and value [1, Hkv, N, D] -> like query."""
        self.layers.add(len(self.layers))  # a model's own layer may attend more than once
        return block_attention(query, key, value, self.mask(window), scale=scale)
