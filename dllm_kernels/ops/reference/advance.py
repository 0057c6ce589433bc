"""The course of block-causal decoding in plain Python: one row, one list after another."""

from __future__ import annotations

from torch import Tensor


def llada_quotas(masks: int, steps: int) -> list[int]:
    return [masks // steps + (step < masks % steps) for step in range(steps)]


def advance_(canvas: Tensor, rows, *, mask_id: int, quota_total: int | None = None, stop_ids=()) -> None:
    """Do what `dllm_kernels.advance_` does: `rows` holds the same tensors, changed in place."""
    size, queries = rows.candidates.shape[1], rows.query_positions.shape[1]
    for b, tokens in enumerate(canvas.tolist()):
        given, stop, end_of_canvas, steps = (
            int(bound[b]) for bound in (rows.given, rows.stop, rows.canvas_end, rows.steps)
        )
        start, cached, computed = (int(t[b]) for t in (rows.block_start, rows.cached, rows.q_lengths))
        if start < end_of_canvas:
            end = min(start + size, end_of_canvas)
            if computed and cached + computed > start:
                rows.step[b] += 1
                rows.block_step[b] += 1
            cached = max(cached, min(cached + computed, start))
            masks = [p for p in range(start, end) if tokens[p] == mask_id]
            stops = [p for p in range(max(start, given), end) if tokens[p] in stop_ids]
            if stops and not (masks and masks[0] < stops[0]):
                start = end_of_canvas
            elif not masks or masks[0] >= stop:
                later = [p for p in range(end, stop) if tokens[p] == mask_id]
                start = later[0] // size * size if later else end_of_canvas
                rows.block_step[b] = 0

        first = last = 0
        end = min(start + size, end_of_canvas)
        if start < end_of_canvas:
            if not rows.block_step[b]:
                rows.block_masks[b] = tokens[start:end].count(mask_id)
            first = cached
            last = end if end - first <= queries else min(first + queries // size * size, start)
        denoises = first < last == end
        rows.block_start[b], rows.cached[b], rows.q_lengths[b] = start, cached, last - first
        rows.quota[b] = 0
        if denoises:
            total, step = quota_total or int(rows.block_masks[b]), int(rows.block_step[b])
            quotas = llada_quotas(total, steps or total)
            rows.quota[b] = quotas[step] if step < len(quotas) else total
        rows.cache_spans[b, 0, 0, 0], rows.cache_spans[b, 0, 0, 1] = 0, first
        for c in range(size):
            rows.candidates[b, c] = start + c if denoises and given <= start + c < end else -1
        for i in range(queries):
            position = first + i
            live = position < last
            rows.query_positions[b, i] = position if live else 0
            rows.write_positions[b, i] = position if live and position < start else -1
            seen_to = min((position // size + 1) * size, last) - first if live else 0
            rows.fresh_spans[b, i, 0, 0], rows.fresh_spans[b, i, 0, 1] = 0, seen_to
