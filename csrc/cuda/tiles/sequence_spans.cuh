// The spans of a tile of queries: its bounds, and which keys of a range every query sees.
#pragma once

#include <cuda_runtime.h>

#include "core/params.h"
#include "core/span_mask.h"

namespace dllm::cuda {

// The spans of one sequence, cut to the keys there are.
struct SequenceSpans {
  const int32_t* data;  // null: every query sees all keys
  int64_t row_stride;
  int count, key_count;

  __device__ SequenceSpans(const SpanTable& table, int64_t batch, int keys)
      : data(table.data ? table.data + batch * table.batch_stride : nullptr),
        row_stride(table.row_stride),
        count(table.count),
        key_count(keys) {}

  __device__ int2 at(int position, int r) const {
    if (!data) return {0, key_count};
    const int32_t* span = data + position * row_stride + r * 2;
    return {max(span[0], 0), max(min(span[1], key_count), 0)};
  }
  // Bit i: the query sees key keys.begin + i; a range has at most 64 keys.
  __device__ uint64_t visible_keys(int position, KeyRange keys) const {
    uint64_t visible = 0;
    for (int r = 0; r < count; r++) {
      const int2 span = at(position, r);
      visible |= key_bits(span.x, min(span.y, keys.end), keys.begin);
    }
    return visible;
  }
  __device__ int bounds_count() const { return min(count, kMaxSpanBounds); }
};

// Bounds of queries [first, first + count) into bounds[spans.bounds_count()]; called by all lanes of a warp.
__device__ inline void tile_bounds(const SequenceSpans& spans, int first, int count, SpanBounds* bounds) {
  const int lane = threadIdx.x % 32;
  SpanBounds sum = no_rows();
  for (int r = 0; r < spans.count; r++) {
    if (r < kMaxSpanBounds) sum = no_rows();
    for (int i = lane; i < count; i += 32) {
      const int2 span = spans.at(first + i, r);
      include(sum, span.x, span.y);
    }
    const SpanBounds tile = {__reduce_min_sync(~0u, sum.min_start), __reduce_max_sync(~0u, sum.max_start),
                             r < kMaxSpanBounds ? __reduce_min_sync(~0u, sum.min_end) : INT_MIN,
                             __reduce_max_sync(~0u, sum.max_end)};
    if (lane == 0) bounds[min(r, kMaxSpanBounds - 1)] = tile;
  }
}

// Does holds(i) for any i < kCount? The same in all lanes of a warp.
template <int kCount, class Holds>
__device__ bool any_of(Holds holds) {
  bool held = false;
#pragma unroll
  for (int i = 0; i < kCount; i += 32) {
    const int mine = i + threadIdx.x % 32;
    held |= mine < kCount && holds(mine);
  }
  return __any_sync(~0u, held);
}

// Of every query of a tile, a bit per key of a range.
template <int kQueries, int kThreads, class Bits = uint64_t>
struct VisibleKeys {
  static_assert(kQueries <= kThreads);
  Bits of_query[kQueries];
  Bits of_warp[kThreads / 32];

  // Query i gets bits(i); returns the keys that any query sees. All threads call it, and all have written
  // when it returns.
  template <class QueryBits>
  __device__ Bits mark(QueryBits bits) {
    const int i = threadIdx.x;
    Bits seen = 0;
    if (i < kQueries) of_query[i] = seen = static_cast<Bits>(bits(i));
    if constexpr (sizeof(Bits) == 8)
      seen = static_cast<Bits>(__reduce_or_sync(~0u, static_cast<unsigned>(seen >> 32))) << 32 |
             __reduce_or_sync(~0u, static_cast<unsigned>(seen));
    else seen = __reduce_or_sync(~0u, seen);
    if (i % 32 == 0) of_warp[i / 32] = seen;
    __syncthreads();
    seen = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; warp++) seen |= of_warp[warp];
    return seen;
  }
};

}  // namespace dllm::cuda
