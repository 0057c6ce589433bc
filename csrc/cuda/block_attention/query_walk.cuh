// The query tiles that see some of a tile of keys: the reverse of core/span_mask.h's walk.
#pragma once

#include "cuda/block_attention/launch.h"
#include "cuda/tiles/sequence_spans.cuh"

namespace dllm::cuda {

// Of the query tiles of a sequence; null without spans.
__device__ inline const SpanBounds* bounds_of(const BackwardWorkspace& workspace,
                                              const BlockAttentionParams& p, int64_t batch) {
  if (!p.spans.data) return nullptr;
  const int tiles = (p.q_len + workspace.tile_queries - 1) / workspace.tile_queries;
  return workspace.bounds + (p.spans.batch_stride ? batch : 0) * tiles * kMaxSpanBounds;
}

// A tile of queries of one head of the group; count 0: there are none left.
struct QueryRange {
  int head, first, count;
  bool full;  // every query sees all keys
};

// Compact, in order; kThreads tiles of queries are looked at together.
template <int kThreads>
struct QueryList {
  int entries[kThreads];  // 2·tile + full
  int warp_counts[kThreads / 32];

  // From tile `first` on, where see(tile) tells the visibility of the keys; returns the number of entries.
  template <class See>
  __device__ int fill(int first, int tiles, See see) {
    const int tile = first + threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Visibility seen = tile < tiles ? see(tile) : Visibility::none;
    const unsigned warp_seen = __ballot_sync(~0u, seen != Visibility::none);
    if (lane == 0) warp_counts[warp] = __popc(warp_seen);
    __syncthreads();  // besides, nobody reads the old entries any more
    int before = __popc(warp_seen & ((1u << lane) - 1)), total = 0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; w++) {
      if (w < warp) before += warp_counts[w];
      total += warp_counts[w];
    }
    if (seen != Visibility::none) entries[before] = 2 * tile + (seen == Visibility::full);
    __syncthreads();
    return total;
  }
};

// Walks over the tiles of a list for every head of a group, list by list.
template <int kTileQueries, int kThreads>
class QueryWalk {
 public:
  // bounds [tiles, kMaxSpanBounds], of the queries' spans; null: every query sees all keys.
  __device__ QueryWalk(QueryList<kThreads>& list, const SpanBounds* bounds, int bounds_count, int q_len,
                       int group, int first_key, int last_key)
      : list_(list),
        bounds_(bounds),
        bounds_count_(bounds_count),
        q_len_(q_len),
        group_(group),
        first_key_(first_key),
        last_key_(last_key) {}

  // Called by all threads alike.
  __device__ QueryRange next() {
    if (++entry_ >= count_) {
      entry_ = 0;
      if (++head_ >= group_ || count_ == 0) {
        head_ = 0;
        const int tiles = (q_len_ + kTileQueries - 1) / kTileQueries;
        for (count_ = 0; count_ == 0 && next_tile_ < tiles; next_tile_ += kThreads)
          count_ = list_.fill(next_tile_, tiles, [&](int tile) {
            if (!bounds_) return Visibility::full;
            return visibility(bounds_ + tile * kMaxSpanBounds, bounds_count_, first_key_, last_key_);
          });
        if (count_ == 0) return {0, 0, 0, false};
      }
    }
    const int entry = list_.entries[entry_], first = entry / 2 * kTileQueries;
    return {head_, first, min(q_len_ - first, kTileQueries), entry % 2 == 1};
  }

 private:
  QueryList<kThreads>& list_;
  const SpanBounds* bounds_;
  int bounds_count_, q_len_, group_, first_key_, last_key_;
  int next_tile_ = 0, count_ = 0, entry_ = 0, head_ = 0;
};

}  // namespace dllm::cuda
