// The keys of one sequence as a list of tiles, and where its rows, keys and partial results lie.
#pragma once

#include "cuda/cached_attention/config.h"
#include "cuda/cached_attention/launch.h"
#include "cuda/tiles/head_pointer.cuh"
#include "cuda/tiles/sequence_spans.cuh"

namespace dllm::cuda {

// Key positions [begin, begin + kCachedKeys) of the cache or of the fresh keys.
struct KeyTile {
  int begin;
  bool cached;

  __device__ int end() const { return begin + kCachedKeys; }
  __device__ KeyRange range() const { return {begin, end(), false}; }
};

struct SequenceKeys {
  int live;  // queries, and fresh keys
  int first_cached, cached_tiles, tiles, splits;

  __device__ KeyTile tile(int t) const {
    if (t < cached_tiles) return {first_cached + t * kCachedKeys, true};
    return {(t - cached_tiles) * kCachedKeys, false};
  }
  // The first tile of a split.
  __device__ int split_begin(int split) const {
    return static_cast<int>(static_cast<int64_t>(tiles) * split / splits);
  }
};

__device__ inline int cached_positions(const CachedAttentionParams& p) {
  return p.pages > 0 ? p.table_length * p.page_size : 0;
}

// The keys of a sequence, as the plan has them. What a plan of another call says is cut to the sizes of this
// one, so that nothing outside its tensors is read.
__device__ inline SequenceKeys planned_keys(const SplitParams& split_params, int64_t batch) {
  const CachedAttentionParams& p = split_params.attention;
  const PlannedSequence planned = split_params.plan.sequences[batch];
  const int positions = cached_positions(p);
  SequenceKeys keys;
  keys.live = min(max(planned.live, 0), p.q_len);
  keys.first_cached = min(max(planned.first_cached, 0), positions);
  keys.cached_tiles =
      min(max(planned.cached_tiles, 0), (positions - keys.first_cached + kCachedKeys - 1) / kCachedKeys);
  keys.tiles = keys.cached_tiles + (keys.live + kCachedKeys - 1) / kCachedKeys;
  keys.splits = min(split_count(p.head_dim, keys.tiles, p.kv_heads, keys.live * (p.q_heads / p.kv_heads)),
                    split_params.max_splits);
  return keys;
}

__device__ inline SequenceSpans spans_of(const CachedAttentionParams& p, int64_t batch, int live,
                                         KeyTile tile) {
  if (tile.cached) return {p.cache_spans, batch, cached_positions(p)};
  return {p.fresh_spans, batch, live};
}

// Rows of one kv head are (query, head of the group) pairs, the heads of a query neighbours.
struct GroupRows {
  int group, kv_head;
  int64_t batch;

  __device__ GroupRows(const CachedAttentionParams& p, int64_t batch, int kv_head)
      : group(p.q_heads / p.kv_heads), kv_head(kv_head), batch(batch) {}

  __device__ int position(int row) const { return row / group; }
  __device__ int head(int row) const { return kv_head * group + row % group; }
  template <class T, class Data>
  __device__ auto at(Data* data, const HeadsLayout& layout, int row) const {
    return head_pointer<T>(data, layout, batch, head(row)) + position(row) * layout.position_stride;
  }
  __device__ int64_t lse_index(const CachedAttentionParams& p, int row) const {
    return (batch * p.q_heads + head(row)) * p.q_len + position(row);
  }
};

// Of row 0 of a split; `rows` are the live ones.
__device__ inline int64_t partial_index(const SplitParams& p, int64_t batch, int split, int kv_head,
                                        int rows) {
  return batch * p.partial_rows + (static_cast<int64_t>(split) * p.attention.kv_heads + kv_head) * rows;
}

// Finds, for each lane, the row of one position of a tile. Addresses are worked out anew for each tile:
// registers are dearer.
template <class T>
class KeyRows {
 public:
  __device__ KeyRows(const CachedAttentionParams& p, int64_t batch, int kv_head)
      : p_(p), batch_(static_cast<int>(batch)), kv_head_(kv_head) {}

  // Reads the page of this lane's position; ahead of rows(), so that nothing waits for it.
  __device__ void look_up(KeyTile tile) {
    if (!tile.cached) return;
    const int entry = min((tile.begin + lane()) / p_.page_size, p_.table_length - 1);
    page_ = min(max(p_.page_table[static_cast<int64_t>(batch_) * p_.table_length + entry], 0), p_.pages - 1);
  }
  struct Rows {
    const T *key, *value;
  };
  __device__ Rows rows(KeyTile tile) const {
    const int position = tile.begin + lane();
    if (!tile.cached) {
      return {head_pointer<T>(p_.k, p_.k_layout, batch_, kv_head_) + position * p_.k_layout.position_stride,
              head_pointer<T>(p_.v, p_.v_layout, batch_, kv_head_) + position * p_.v_layout.position_stride};
    }
    return {slot(p_.cache_k, p_.cache_k_layout, position), slot(p_.cache_v, p_.cache_v_layout, position)};
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ const T* slot(const void* cache, const PagesLayout& layout, int position) const {
    return static_cast<const T*>(cache) + page_ * layout.page_stride +
           position % p_.page_size * layout.slot_stride + kv_head_ * layout.head_stride;
  }

  const CachedAttentionParams& p_;
  int batch_, kv_head_, page_ = 0;
};

// A lane's pointer in the lanes that ask for lane `from`.
template <class T>
__device__ const T* shuffled(const T* pointer, int from) {
  const auto bits = reinterpret_cast<unsigned long long>(pointer);
  return reinterpret_cast<const T*>(__shfl_sync(~0u, bits, from));
}

}  // namespace dllm::cuda
