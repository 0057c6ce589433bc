// What a span mask means, for host and device. A query sees the union of a few half-open ranges
// [start, end) of key positions, sorted and disjoint; an empty range (start >= end) sees nothing. The
// rows of one query tile are summed up by four numbers per span index, from which the walk over the
// keys decides what is skipped, what is seen by every row, and what needs a look at each row's spans.
#pragma once

#include <limits.h>

#include "core/host_device.h"

namespace dllm {

// Over the rows of a tile, for one span index.
struct SpanBounds {
  int min_start, max_start, min_end, max_end;
};

// Spans beyond this many share the last entry, which is then never seen as full.
constexpr int kMaxSpanBounds = 8;

DLLM_HOST_DEVICE SpanBounds no_rows() { return {INT_MAX, INT_MIN, INT_MAX, INT_MIN}; }

DLLM_HOST_DEVICE void include(SpanBounds& bounds, int start, int end) {
  if (start >= end) {
    bounds.min_end = INT_MIN;  // this row sees nothing through this span: no range is full
    return;
  }
  bounds.min_start = start < bounds.min_start ? start : bounds.min_start;
  bounds.max_start = start > bounds.max_start ? start : bounds.max_start;
  bounds.min_end = end < bounds.min_end ? end : bounds.min_end;
  bounds.max_end = end > bounds.max_end ? end : bounds.max_end;
}

// Keys [begin, end) that some row of the tile may see; `full`: every row sees all of them.
struct KeyRange {
  int begin, end;
  bool full;
};

// The first such range at or after `from`, at most `limit` keys long; empty when there is none left.
DLLM_HOST_DEVICE KeyRange next_keys(const SpanBounds* bounds, int count, int from, int limit) {
  int begin = INT_MAX;
  for (int r = 0; r < count; r++) {
    const int start = bounds[r].min_start > from ? bounds[r].min_start : from;
    if (start < bounds[r].max_end && start < begin) begin = start;
  }
  if (begin == INT_MAX) return {from, from, false};
  int end = begin;
  for (bool grew = true; grew && end - begin < limit;) {
    grew = false;
    for (int r = 0; r < count; r++) {
      if (bounds[r].min_start <= end && end < bounds[r].max_end) {
        end = bounds[r].max_end;
        grew = true;
      }
    }
  }
  end = end - begin < limit ? end : begin + limit;
  bool full = false;
  for (int r = 0; r < count; r++) full |= bounds[r].max_start <= begin && end <= bounds[r].min_end;
  return {begin, end, full};
}

}  // namespace dllm
