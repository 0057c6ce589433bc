// What a span mask means, for host and device. A query sees the union of a few half-open ranges
// [start, end) of key positions, sorted and disjoint; an empty range (start >= end) sees nothing. The
// rows of one query tile are summed up by four numbers per span index, from which the walk over the
// keys decides what is skipped, what is seen by every row, and what needs a look at each row's spans.
#pragma once

#include <limits.h>
#include <stdint.h>

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

// The ranges that next_keys gives one after the other, from key 0 on. Within a span that every row sees the
// next one costs a comparison.
class KeyWalk {
 public:
  DLLM_HOST_DEVICE KeyWalk(const SpanBounds* bounds, int count, int limit)
      : bounds_(bounds), count_(count), limit_(limit) {}

  // Empty when there is none left.
  DLLM_HOST_DEVICE KeyRange next() {
    if (done_ + limit_ <= full_until_) {
      done_ += limit_;
      return {done_ - limit_, done_, true};
    }
    const KeyRange keys = next_keys(bounds_, count_, done_, limit_);
    done_ = keys.end;
    for (int r = 0; keys.full && r < count_; r++) {
      if (bounds_[r].max_start <= keys.begin && bounds_[r].min_end > full_until_)
        full_until_ = bounds_[r].min_end;
    }
    return keys;
  }

 private:
  const SpanBounds* bounds_;
  int count_, limit_;
  int done_ = 0, full_until_ = 0;
};

enum class Visibility { none, partial, full };

// Of keys [begin, end), not empty, for rows with these bounds. `none` is certain; `partial` may turn out to
// be none.
DLLM_HOST_DEVICE Visibility visibility(const SpanBounds* bounds, int count, int begin, int end) {
  Visibility seen = Visibility::none;
  for (int r = 0; r < count; r++) {
    if (bounds[r].max_start <= begin && end <= bounds[r].min_end) return Visibility::full;
    if (bounds[r].min_start < end && begin < bounds[r].max_end) seen = Visibility::partial;
  }
  return seen;
}

// Bits [0, count) of 64; none for a negative count.
DLLM_HOST_DEVICE uint64_t first_bits(int count) {
  return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
}

// Bit i: key `begin` + i of at most 64 is one of [start, end).
DLLM_HOST_DEVICE uint64_t key_bits(int start, int end, int begin) {
  return first_bits(end - begin) & ~first_bits(start - begin);
}

}  // namespace dllm
