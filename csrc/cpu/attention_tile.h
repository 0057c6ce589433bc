// Which rows and keys a work item of the attention kernels is about.
#pragma once

#include "core/params.h"
#include "core/span_mask.h"
#include "cpu/attention_forward.h"
#include "cpu/dtype.h"
#include "cpu/gemm_tile.h"

namespace dllm::cpu::DLLM_ISA {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxTileQueries = 128;
constexpr int kMaxChunk = 128;
constexpr float kLog2E = 1.4426950408889634f;

// Keys taken up at a time: they and their scores stay in the first-level cache.
DLLM_SIMD int chunk_keys(int dim) { return dim <= 32 ? 128 : dim <= 64 ? 64 : 32; }
constexpr int kMaxChunkFloats = 32 * kMaxHeadDim;

// Rows of head_dim floats, followed by zeros up to whole panels.
DLLM_SIMD int padded(int dim) { return (dim + kPanel - 1) / kPanel * kPanel; }

// Consecutive (position, query head) pairs that share one kv head; the heads of a position are neighbours.
struct TileRows {
  int first, count, group;

  int position(int row) const { return (first + row) / group; }
  int head(int row) const { return (first + row) % group; }
  int panels() const { return (count + kPanel - 1) / kPanel; }
};

// Rows of one sequence and kv head.
struct TileItem {
  TileRows rows;
  int batch, kv_head;

  // Row i of a [batch, q_heads, positions, head_dim] tensor.
  template <typename T, typename Data>
  T* row(Data* data, const HeadsLayout& layout, int i) const {
    return static_cast<T*>(data) + batch * layout.batch_stride + q_head(i) * layout.head_stride +
           rows.position(i) * layout.position_stride;
  }
  // A key's row of a [batch, kv_heads, positions, head_dim] tensor.
  template <typename T, typename Data>
  T* key(Data* data, const HeadsLayout& layout, int position) const {
    return static_cast<T*>(data) + batch * layout.batch_stride + kv_head * layout.head_stride +
           position * layout.position_stride;
  }
  int64_t lse_index(int i, int64_t q_heads, int64_t q_len) const {
    return (batch * q_heads + q_head(i)) * q_len + rows.position(i);
  }
  int q_head(int i) const { return kv_head * rows.group + rows.head(i); }
};

DLLM_SIMD int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// At most `size` rows from `first` on, of q_len * group.
DLLM_SIMD TileRows tile_rows(int first, int size, int group, int q_len) {
  return {first, clamp(q_len * group - first, 0, size), group};
}

// The longest tiles of causal patterns are the last ones: they are handed out first.
DLLM_SIMD TileItem tile_item(int64_t item, int q_heads, int kv_heads, int q_len) {
  const int group = q_heads / kv_heads, size = attention_tile_rows(group);
  const int tiles = static_cast<int>(attention_tiles(size, group, q_len));
  const int sequence_head = static_cast<int>(item / tiles), tile = tiles - 1 - static_cast<int>(item % tiles);
  return {tile_rows(tile * size, size, group, q_len), sequence_head / kv_heads, sequence_head % kv_heads};
}

// The spans of one sequence; keys from `key_count` on are seen by nobody.
struct SequenceSpans {
  SpanTable table;
  int batch, key_count;

  struct Range {
    int start, end;
  };
  Range at(int position, int r) const {
    if (!table.data) return {0, key_count};
    const int32_t* span = table.data + batch * table.batch_stride + position * table.row_stride + r * 2;
    return {span[0], span[1] < key_count ? span[1] : key_count};
  }
};

// What the queries of a tile see: the walk over the keys, chunk by chunk.
class TileSpans {
 public:
  TileSpans() = default;
  TileSpans(const SequenceSpans& spans, TileRows rows) : spans_(spans), rows_(rows) {
    count_ = spans.table.count < kMaxSpanBounds ? spans.table.count : kMaxSpanBounds;
    for (int r = 0; r < count_; r++) bounds_[r] = no_rows();
    for (int t = rows.position(0); t <= rows.position(rows.count - 1); t++) {
      for (int r = 0; r < spans.table.count; r++) {
        const SequenceSpans::Range span = spans.at(t, r);
        include(bounds_[r < count_ ? r : count_ - 1], span.start, span.end);
      }
    }
    if (spans.table.count > count_) bounds_[count_ - 1].min_end = INT_MIN;
  }

  // The first keys at or after `from` that some query may see, at most `limit`; empty: there are none left.
  KeyRange next(int from, int limit) const { return next_keys(bounds_, count_, from, limit); }

  // seen[i]: some query sees key begin + i. Returns whether all of them are seen.
  bool mark_seen(KeyRange keys, bool* seen) const {
    const int count = keys.end - keys.begin;
    int change[kMaxChunk + 1] = {};  // how many queries start or stop seeing at a key
    for (int t = rows_.position(0); t <= rows_.position(rows_.count - 1); t++) {
      for (int r = 0; r < spans_.table.count; r++) {
        const SequenceSpans::Range span = spans_.at(t, r);
        const int start = span.start > keys.begin ? span.start - keys.begin : 0;
        const int end = span.end < keys.end ? span.end - keys.begin : count;
        if (start >= end) continue;
        change[start]++;
        change[end]--;
      }
    }
    bool all = true;
    for (int i = 0, queries = 0; i < count; i++) {
      queries += change[i];
      seen[i] = queries > 0;
      all &= seen[i];
    }
    return all;
  }

  // visible[key][lane]: -1 where the query of row first_row + lane sees the key, else 0.
  void mark_visible(KeyRange keys, int first_row, int32_t* visible) const {
    const int count = keys.end - keys.begin;
    memset(visible, 0, sizeof(int32_t) * count * kPanel);
    for (int r = 0; r < spans_.table.count; r++) {
      alignas(64) int32_t starts[kPanel] = {}, ends[kPanel] = {};
      for (int lane = 0; lane < kPanel && first_row + lane < rows_.count; lane++) {
        const SequenceSpans::Range span = spans_.at(rows_.position(first_row + lane), r);
        starts[lane] = span.start - keys.begin;
        ends[lane] = span.end - keys.begin;
      }
      for (int n = 0; n < kPanel; n += kLanes) {
        const Ints start = load(starts + n), end = load(ends + n);
        for (int i = 0; i < count; i++) {
          int32_t* here = visible + i * kPanel + n;
          store(here, load(here) | ((start <= i) & (i < end)));
        }
      }
    }
  }

 private:
  SequenceSpans spans_;
  TileRows rows_;
  int count_;
  SpanBounds bounds_[kMaxSpanBounds];
};

// Rows of keys (or values) as float32: where they lie if they are that and dense, else widened into `buffer`.
// row(key) finds a key's row. Of keys that nobody sees zeros are taken: whatever is stored there, NaN
// included, has no influence. seen == nullptr: all are seen.
template <typename T, typename Row>
DLLM_SIMD const float* float_rows(Row row, bool dense, KeyRange keys, const bool* seen, int dim,
                                  float* buffer) {
  if constexpr (__is_same(T, float)) {
    if (dense && !seen) return row(keys.begin);
  }
  for (int i = 0; i < keys.end - keys.begin; i++, buffer += dim) {
    if (!seen || seen[i]) widen_row(row(keys.begin + i), buffer, dim);
    else memset(buffer, 0, sizeof(float) * dim);
  }
  return buffer - (keys.end - keys.begin) * dim;
}

// Rows of a tile, times `factor`: row(i) finds row i. rows [whole panels][padded(dim)].
template <typename T, typename Row>
DLLM_SIMD void widen_rows(Row row, int count, int dim, float factor, float* rows) {
  const int stride = padded(dim);
  for (int i = 0; i < count; i++) {
    widen_row(row(i), rows + i * stride, dim, factor);
    if (dim < stride) memset(rows + i * stride + dim, 0, sizeof(float) * (stride - dim));
  }
  memset(rows + count * stride, 0, sizeof(float) * (-count & (kPanel - 1)) * stride);
}

}  // namespace dllm::cpu::DLLM_ISA
