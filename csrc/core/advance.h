// How rows of block-causal decoding move from step to step and from block to block, for host and device.
//
// A row decodes its active block [block_start, block_end). Keys and values of its positions before `cached`
// are in pages; the next forward computes the positions from there to block_end, so the first step of a block
// also computes the block finished before it and leaves its keys and values in the pages. Where a forward has
// no room for all of them, forwards before it catch up: they compute final blocks only, and nothing is
// committed.
#pragma once

#include <stdint.h>

#include "core/host_device.h"
#include "core/params.h"

namespace dllm {

constexpr int32_t kLastStep = INT32_MAX;  // where counts of steps stay

// Quota of step `step` (from 0) of `steps` over `masks` tokens [LLaDA]; a step after the last takes all.
DLLM_HOST_DEVICE int llada_quota(int masks, int steps, int step) {
  return step < steps ? masks / steps + (step < masks % steps) : masks;
}

// One row of AdvanceParams: positions inside the canvas, counts not negative.
struct BlockRow {
  int given, stop, canvas_end;
  int block_start, cached, q_length, block_masks, step, block_step;

  DLLM_HOST_DEVICE bool finished() const { return block_start >= canvas_end; }
  DLLM_HOST_DEVICE int block_end(int block_size) const {
    return canvas_end - block_start < block_size ? canvas_end : block_start + block_size;
  }
  // Whether the last forward reached the active block, rather than catching up.
  DLLM_HOST_DEVICE bool denoised() const { return q_length > 0 && cached + q_length > block_start; }
  // Where the active block has positions of the completion.
  DLLM_HOST_DEVICE int completion() const { return block_start > given ? block_start : given; }
};

// What the canvas holds after a commit, for a row with the active block [block_start, end): the first mask
// there, the first stop token from completion() on, the first mask in [end, stop); where there is none, the
// range's end.
struct BlockScan {
  int first_mask, first_stop, next_mask;
};

// After a forward and the commit of what it proposed. Where block_step is 0 then, the masks of the active
// block are still to be counted.
DLLM_HOST_DEVICE BlockRow advanced(BlockRow row, const BlockScan& scan, int block_size) {
  if (row.finished()) return row;
  if (row.denoised()) row.step += row.step < kLastStep, row.block_step += row.block_step < kLastStep;
  const int computed = row.cached + row.q_length, end = row.block_end(block_size);
  if (row.cached < row.block_start) row.cached = computed < row.block_start ? computed : row.block_start;
  if (scan.first_stop < scan.first_mask) {
    row.block_start = row.canvas_end;
  } else if (scan.first_mask == end || scan.first_mask >= row.stop) {
    row.block_start = scan.next_mask < row.stop ? scan.next_mask / block_size * block_size : row.canvas_end;
    row.block_step = 0;
  }
  if (row.cached > row.block_start && !row.finished()) row.cached = row.block_start;  // what follows changes
  return row;
}

// Positions [first, end) that a row's next forward computes; `denoises`: up to the end of the active block.
struct BlockView {
  int first, end;
  bool denoises;
};

DLLM_HOST_DEVICE BlockView block_view(const BlockRow& row, int block_size, int queries) {
  if (row.finished()) return {0, 0, false};
  const int end = row.block_end(block_size);
  if (end - row.cached <= queries) return {row.cached, end, true};
  const int room = row.cached + queries / block_size * block_size;
  return {row.cached, room < row.block_start ? room : row.block_start, false};
}

// What stands at index i of the lists of row b; i < block_size for candidates, < queries for the others.
DLLM_HOST_DEVICE void write_view(const AdvanceParams& p, int64_t b, const BlockRow& row,
                                 const BlockView& view, int i) {
  const int position = view.first + i, block_start = row.block_start;
  if (i < p.block_size) {
    const int candidate = block_start + i;
    const bool listed = view.denoises && candidate >= row.given && candidate < view.end;
    p.candidates[b * p.block_size + i] = listed ? candidate : -1;
  }
  if (i < p.queries) {
    const int64_t at = b * p.queries + i;
    const bool live = position < view.end;
    const int border = (position / p.block_size + 1) * p.block_size;
    p.query_positions[at] = live ? position : 0;
    p.write_positions[at] = live && position < block_start ? position : -1;
    p.fresh_spans[2 * at] = 0;
    p.fresh_spans[2 * at + 1] = live ? (border < view.end ? border : view.end) - view.first : 0;
  }
}

DLLM_HOST_DEVICE BlockRow block_row(const AdvanceParams& p, int64_t b) {
  const auto inside = [&](int32_t position) {
    return position < 0 ? 0 : position > p.canvas_length ? p.canvas_length : position;
  };
  const auto count = [](int32_t value) { return value < 0 ? 0 : value; };
  const int end = inside(p.canvas_end[b]), stop = inside(p.stop[b]);
  return {inside(p.given[b]),       stop < end ? stop : end, end,
          inside(p.block_start[b]), inside(p.cached[b]),     inside(p.q_lengths[b]),
          count(p.block_masks[b]),  count(p.step[b]),        count(p.block_step[b])};
}

DLLM_HOST_DEVICE void store_row(const AdvanceParams& p, int64_t b, const BlockRow& row,
                                const BlockView& view) {
  const int total = p.quota_total > 0 ? p.quota_total : row.block_masks;
  const int steps = p.steps[b] > 0 ? p.steps[b] : total;
  p.block_start[b] = row.block_start;
  p.cached[b] = row.cached;
  p.q_lengths[b] = view.end - view.first;
  p.block_masks[b] = row.block_masks;
  p.step[b] = row.step;
  p.block_step[b] = row.block_step;
  p.quota[b] = view.denoises ? llada_quota(total, steps, row.block_step) : 0;
  p.cache_spans[2 * b] = 0;
  p.cache_spans[2 * b + 1] = view.first;
}

}  // namespace dllm
