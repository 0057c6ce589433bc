"""Rows of block-causal decoding on the device: from step to step and block to block without the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_tensors, integer, integers, kind
from ._fake import register_fake

_ops = torch.ops.dllm_kernels


@dataclass(frozen=True, eq=False)
class BlockRows:
    """B rows of block-causal decoding and their next step, in int32 tensors that keep their place, so that a CUDA
    graph can hold them. C is the block size, Q >= C the tokens of a row in one forward; 2 C lets a block's first
    step also write the keys and values of the block before it.

    Asked of a row, [B]: given, stop: where its completion starts and stops; canvas_end: where its canvas ends;
    steps: of each block, 0 for one token per step.

    Where it is, [B]: block_start: of its active block, canvas_end when it is finished; cached: its positions from
    0 on whose keys and values are in pages; q_lengths: its tokens in the next forward; block_masks: masks its
    block had at the first step; step, block_step: steps of the row and of its block so far.

    The next step: quota [B] and candidates [B, C], the positions that may be unmasked, -1 for none: for
    `commit_`. query_positions [B, Q]: the tokens of the forward, of which the first q_lengths count. cache_spans
    [B, 1, 1, 2], fresh_spans [B, Q, 1, 2], q_lengths: for `cached_block_attention`. write_positions [B, Q]: those
    of final tokens, else -1: for `kv_write_`.
    """

    given: Tensor
    stop: Tensor
    canvas_end: Tensor
    steps: Tensor
    block_start: Tensor
    cached: Tensor
    q_lengths: Tensor
    block_masks: Tensor
    step: Tensor
    block_step: Tensor
    quota: Tensor
    candidates: Tensor
    query_positions: Tensor
    write_positions: Tensor
    cache_spans: Tensor
    fresh_spans: Tensor

    @classmethod
    def empty(cls, batch: int, block_size: int, queries: int, device: torch.device | str) -> BlockRows:
        """Rows that have nothing to do."""
        batch, block_size = integer("batch", batch, 0), integer("block_size", block_size, 1)
        queries = integer("queries", queries, block_size)
        shapes = {
            "candidates": (batch, block_size),
            "query_positions": (batch, queries),
            "write_positions": (batch, queries),
            "cache_spans": (batch, 1, 1, 2),
            "fresh_spans": (batch, queries, 1, 2),
        }
        filled = {name: -1 for name in ("candidates", "write_positions")}
        return cls(
            **{
                field.name: torch.full(
                    shapes.get(field.name, (batch,)),
                    filled.get(field.name, 0),
                    dtype=torch.int32,
                    device=device,
                )
                for field in fields(cls)
            }
        )

    def admit_(
        self, row: int, *, given: int, stop: int, canvas_end: int, steps: int = 0, cached: int = 0
    ) -> None:
        """Hand `row` to a new sequence; `advance_` then finds its first block.

        cached: leading positions, whole blocks, that are in pages already. Prompt tokens that are not are
        computed and written by the steps themselves, Q at a time.
        """
        asked = dict(given=given, stop=stop, canvas_end=canvas_end, steps=steps, cached=cached)
        for name, value in asked.items():
            getattr(self, name)[row] = integer(name, value, 0)
        for name in ("block_start", "q_lengths", "block_masks", "step", "block_step"):
            getattr(self, name)[row] = 0

    @property
    def finished(self) -> Tensor:
        """bool [B], rows with nothing left to do."""
        return self.block_start >= self.canvas_end


def advance_(
    canvas: Tensor,
    rows: BlockRows,
    *,
    mask_id: int,
    quota_total: int | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Move every row to its next step, in place: after a forward over `rows` and its `commit_`, or before the first.

    canvas: int64 or int32 [B, T], read. A row stays in its block while this holds a mask before `stop`; then it
    goes to the next block that does, or is finished. It is finished too when its block has one of `stop_ids` in
    the completion with no mask before it. What the last forward wrote counts as cached, and the next one computes
    the positions from there to the end of the active block: in a block's first step also the block before. If that
    is more than Q, as with a long prompt, it computes only as many final blocks as have room and commits nothing.

    The quota of a step is that of the `llada` schedule: `quota_total` (None: the masks of the block) spread over
    `steps`; a step beyond them takes all. Rules without a quota leave it aside. Everything runs on the device of
    the tensors, without synchronisation.

    One round, of which a CUDA graph can hold all (`model` reads and writes the pages)::

        tokens = canvas.gather(1, rows.query_positions.long())
        hidden = model(tokens, rows)                       # attends and kv_write_s by the spans and positions
        place = (rows.candidates - rows.cached[:, None]).clamp(0, rows.query_positions.shape[1] - 1)
        commit_(canvas, rows.candidates, stats_of(hidden, place), rule, mask_id=mask_id, quota=rows.quota, step=rows.step)
        advance_(canvas, rows, mask_id=mask_id, stop_ids=stop_ids)
    """
    check_tensors(canvas=canvas)
    if not isinstance(rows, BlockRows):
        raise TypeError(f"rows must be a BlockRows, got {kind(rows)}")
    _ops.advance_(
        canvas,
        *(getattr(rows, field.name) for field in fields(rows)),
        integer("mask_id", mask_id, 0),
        0 if quota_total is None else integer("quota_total", quota_total, 1),
        integers("stop_ids", stop_ids),
    )


@register_fake("advance_")
def _(*arguments, **options):
    return None
