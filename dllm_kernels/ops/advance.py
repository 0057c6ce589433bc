"""Rows of block-causal decoding on the device: from step to step and block to block without the host."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_tensors, integer, integers, kind
from ._autograd import register_in_place
from ._fake import register_fake

_ops = torch.ops.dllm_kernels


@functools.cache
def row_shapes(block_size: int, queries: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of B rows in buffer order: names, and shapes after [B] (core/block_rows.h)."""
    block_size = integer("block_size", block_size, 1)
    sizes = {"block_size": block_size, "queries": integer("queries", queries, block_size)}
    shapes = {}
    for line in _ops.block_row_layout().splitlines():
        name, _, shape = line.partition(" ")
        shapes[name] = tuple(sizes.get(size) or int(size) for size in shape.split(", ") if size)
    return shapes


@dataclass(frozen=True, eq=False)
class BlockRows:
    """B rows of block-causal decoding and their next step, in int32 tensors at fixed addresses, so that a
    CUDA graph can hold them.

    C is block_size, Q = queries >= C the tokens of a row in one forward. With 2 C a block's first step has
    room to write the keys and values of the block before it too. buffer: int32 [N], contiguous; the tensors
    are views of it, to read and to write.

    Inputs, [B]: given, stop: where the completion starts and stops; canvas_end: where the canvas ends;
    steps: per block, 0 for one token per step.

    State, [B]: block_start: of the active block, canvas_end when the row is finished; cached: number of
    leading positions with keys and values in pages; q_lengths: its tokens in the next forward;
    block_masks: masks its block had at the first step; step, block_step: steps of the row and of its block.

    The next step, for `commit_`: quota [B], and candidates [B, C], the positions that may be unmasked, -1 for
    none. For the forward: query_positions [B, Q]; the first q_lengths count. For `cached_block_attention`:
    cache_spans [B, 1, 1, 2], fresh_spans [B, Q, 1, 2] and q_lengths. For `kv_write_`: write_positions [B, Q],
    those of final tokens, else -1.
    """

    buffer: Tensor
    block_size: int
    queries: int
    given: Tensor = field(init=False)
    stop: Tensor = field(init=False)
    canvas_end: Tensor = field(init=False)
    steps: Tensor = field(init=False)
    block_start: Tensor = field(init=False)
    cached: Tensor = field(init=False)
    q_lengths: Tensor = field(init=False)
    block_masks: Tensor = field(init=False)
    step: Tensor = field(init=False)
    block_step: Tensor = field(init=False)
    quota: Tensor = field(init=False)
    candidates: Tensor = field(init=False)
    query_positions: Tensor = field(init=False)
    write_positions: Tensor = field(init=False)
    cache_spans: Tensor = field(init=False)
    fresh_spans: Tensor = field(init=False)

    def __post_init__(self) -> None:
        check_tensors(buffer=self.buffer)
        shapes = row_shapes(self.block_size, self.queries)
        sizes = [math.prod(shape) for shape in shapes.values()]
        numbers, buffer = sum(sizes), self.buffer
        fits = buffer.dtype == torch.int32 and buffer.dim() == 1 and buffer.is_contiguous()
        if not fits or len(buffer) % numbers:
            raise ValueError(f"buffer must be contiguous int32 [B * {numbers}], got {kind(buffer)}")
        batch = len(buffer) // numbers
        tensors = buffer.split([batch * size for size in sizes])
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            object.__setattr__(self, name, tensor.view(batch, *shape))

    @classmethod
    def empty(cls, batch: int, block_size: int, queries: int, device: torch.device | str) -> BlockRows:
        """Return idle rows."""
        numbers = sum(map(math.prod, row_shapes(block_size, queries).values()))
        buffer = torch.zeros(integer("batch", batch, 0) * numbers, dtype=torch.int32, device=device)
        rows = cls(buffer, block_size, queries)
        rows.candidates.fill_(-1)
        rows.write_positions.fill_(-1)
        return rows

    def admit_(
        self, row: int, *, given: int, stop: int, canvas_end: int, steps: int = 0, cached: int = 0
    ) -> None:
        """Assign `row` to a new sequence; `advance_` then finds its first block.

        cached: leading positions, whole blocks, that are in pages already. The steps compute and write the
        other prompt tokens, Q at a time.
        """
        asked = dict(
            given=integer("given", given, 0),
            stop=integer("stop", stop, given),
            canvas_end=integer("canvas_end", canvas_end, stop),
            steps=integer("steps", steps, 0),
            cached=integer("cached", cached, 0, canvas_end),
        )
        if cached % self.block_size:
            raise ValueError(f"cached must be whole blocks of {self.block_size}, got {cached}")
        for name, value in asked.items():
            getattr(self, name)[row] = value
        for name in ("block_start", "q_lengths", "block_masks", "step", "block_step"):
            getattr(self, name)[row] = 0

    @property
    def finished(self) -> Tensor:
        """Return bool [B], rows with nothing left to do."""
        return self.block_start >= self.canvas_end


def advance_(
    canvas: Tensor,
    rows: BlockRows,
    *,
    mask_id: int,
    quota_total: int | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Move every row to its next step in place, after a forward over `rows` and its `commit_` or before the
    first forward. Runs on the device of the tensors, without synchronisation.

    canvas: int64 or int32 [B, T], read. A row stays in its block while a mask before `stop` is left there;
    then it moves to the next block with a mask, or is finished. It is also finished when its block has one of
    `stop_ids` in the completion with no mask before it (the caller fills the rest).

    Positions that the last forward wrote are now cached. The next forward computes from there to the end of
    the active block: in a block's first step also the previous, finished block, which saves it a separate
    forward. If that is more than Q tokens, as after a long prompt, it computes only as many final blocks as
    fit, and nothing is committed.

    The quota is that of the `llada` schedule: `quota_total` (None: the masks of the block) over `steps`; a
    step after the last takes all. Rules without a quota leave it aside.

    One round, all of which a CUDA graph can hold; `forward` attends by the spans and writes final tokens::

        hidden = forward(canvas.gather(1, rows.query_positions.long()), rows)  # [B, Q, hidden]
        place = (rows.candidates - rows.cached[:, None]).clamp(0, Q - 1)
        stats = linear_token_stats(hidden[arange(B)[:, None], place].flatten(0, 1), head, ...)
        commit_(canvas, rows.candidates, stats, rule, mask_id=mask_id, quota=rows.quota, step=rows.step)
        advance_(canvas, rows, mask_id=mask_id, stop_ids=stop_ids)
    """
    check_tensors(canvas=canvas)
    if not isinstance(rows, BlockRows):
        raise TypeError(f"rows must be a BlockRows, got {kind(rows)}")
    _ops.advance_(
        canvas,
        rows.buffer,
        rows.block_size,
        rows.queries,
        integer("mask_id", mask_id, 0),
        0 if quota_total is None else integer("quota_total", quota_total, 1),
        integers("stop_ids", stop_ids),
    )


@register_fake("advance_")
def _(*arguments, **options):
    return None


register_in_place("advance_")
