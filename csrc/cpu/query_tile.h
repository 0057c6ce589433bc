// A tile of queries that attends to the keys its spans show, chunk by chunk, with an online softmax.
// Queries are columns throughout (one SIMD lane each): scores are K·Qᵀ, the output is accumulated as
// Vᵀ·P, and the softmax needs no horizontal step. Scores are in base 2: log2(e) is folded into Q.
#pragma once

#include "core/params.h"
#include "core/softmax_state.h"
#include "core/span_mask.h"
#include "cpu/attention_forward.h"
#include "cpu/gemm_tile.h"

namespace dllm::cpu::DLLM_ISA {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxTileQueries = 128;
constexpr int kChunk = 128;  // keys taken up at a time

// Consecutive (position, query head) pairs that share one kv head; the heads of a position are neighbours.
struct TileRows {
  int first, count, group;

  int position(int row) const { return (first + row) / group; }
  int head(int row) const { return (first + row) % group; }
};

// Where a work item of the attention kernels stands: rows of one sequence and kv head.
struct TileItem {
  TileRows rows;
  int batch, kv_head;

  // Row i of a [batch, q_heads, positions, head_dim] tensor.
  template <typename T, typename Data>
  T* row(Data* data, const HeadsLayout& layout, int i) const {
    return static_cast<T*>(data) + batch * layout.batch_stride + q_head(i) * layout.head_stride +
           rows.position(i) * layout.position_stride;
  }
  template <typename T>
  const T* key(const void* data, const HeadsLayout& layout, int position) const {
    return static_cast<const T*>(data) + batch * layout.batch_stride + kv_head * layout.head_stride +
           position * layout.position_stride;
  }
  int64_t lse_index(int i, int64_t q_heads, int64_t q_len) const {
    return (batch * q_heads + q_head(i)) * q_len + rows.position(i);
  }
  int q_head(int i) const { return kv_head * rows.group + rows.head(i); }
};

DLLM_SIMD int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// The longest tiles of causal patterns are the last ones: they are handed out first.
DLLM_SIMD TileItem tile_item(int64_t item, int q_heads, int kv_heads, int q_len) {
  const int group = q_heads / kv_heads, tile_rows = attention_tile_rows(group), rows = q_len * group;
  const int tiles = (rows + tile_rows - 1) / tile_rows;
  const int sequence_head = static_cast<int>(item / tiles);
  const int first = (tiles - 1 - static_cast<int>(item % tiles)) * tile_rows;
  return {
      {first, clamp(rows - first, 0, tile_rows), group}, sequence_head / kv_heads, sequence_head % kv_heads};
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

class QueryTile {
 public:
  QueryTile(TileRows rows, int head_dim, float scale)
      : rows_(rows), dim_(head_dim), panels_((rows.count + kPanel - 1) / kPanel), scale_(scale) {
    memset(query_, 0, sizeof(float) * panels_ * kPanel * dim_);
    memset(output_, 0, sizeof(float) * panels_ * kPanel * dim_);
    for (int i = 0; i < panels_ * kPanel; i++) {
      max_[i] = -kInfinity;
      sum_[i] = 0.0f;
    }
  }

  template <typename T>
  void set_query(int row, const T* from) {
    float* to = query_ + (row / kPanel) * kPanel * dim_ + row % kPanel;
    const float factor = scale_ * 1.4426950408889634f;
    for (int d = 0; d < dim_; d++) to[d * kPanel] = widen(from[d]) * factor;
  }

  // load(key, k, v) writes one key and its value, dim floats each. It is called for no key that none
  // of these queries sees: whatever is stored there, NaN included, has no influence.
  template <typename Load>
  void attend(const SequenceSpans& spans, Load load) {
    SpanBounds bounds[kMaxSpanBounds];
    const int count = tile_bounds(spans, bounds);
    KeyRange keys = next_keys(bounds, count, 0, kChunk);
    for (; keys.begin < keys.end; keys = next_keys(bounds, count, keys.end, kChunk)) {
      if (!keys.full) mark_seen(spans, keys);
      for (int i = 0; i < keys.end - keys.begin; i++) {
        float *k = keys_ + i * dim_, *v = values_ + i * dim_;
        if (keys.full || seen_[i]) {
          load(keys.begin + i, k, v);
        } else {
          memset(k, 0, sizeof(float) * dim_);
          memset(v, 0, sizeof(float) * dim_);
        }
      }
      for (int panel = 0; panel < panels_; panel++) attend_chunk(spans, keys, panel);
    }
  }

  template <typename T>
  void get_output(int row, T* to, float* lse) const {
    const SoftmaxState state{max_[row], sum_[row]};
    const float* from = output_ + (row / kPanel) * kPanel * dim_ + row % kPanel;
    const float factor = state.inverse_sum();
    for (int d = 0; d < dim_; d++) narrow(state.sum == 0.0f ? 0.0f : from[d * kPanel] * factor, to[d]);
    *lse = state.log_sum_exp();
  }

 private:
  int tile_bounds(const SequenceSpans& spans, SpanBounds* bounds) const {
    const int span_count = spans.table.data ? spans.table.count : 1;
    const int count = span_count < kMaxSpanBounds ? span_count : kMaxSpanBounds;
    for (int r = 0; r < count; r++) bounds[r] = no_rows();
    for (int t = rows_.position(0); t <= rows_.position(rows_.count - 1); t++) {
      for (int r = 0; r < span_count; r++) {
        const SequenceSpans::Range span = spans.at(t, r);
        include(bounds[r < count ? r : count - 1], span.start, span.end);
      }
    }
    if (span_count > count) bounds[count - 1].min_end = INT_MIN;
    return count;
  }

  // seen_[i]: some query of the tile sees key begin + i.
  void mark_seen(const SequenceSpans& spans, KeyRange keys) {
    const int count = keys.end - keys.begin;
    int change[kChunk + 1] = {};  // how many queries start or stop seeing at a key
    for (int t = rows_.position(0); t <= rows_.position(rows_.count - 1); t++) {
      for (int r = 0; r < spans.table.count; r++) {
        const SequenceSpans::Range span = spans.at(t, r);
        const int start = span.start > keys.begin ? span.start - keys.begin : 0;
        const int end = span.end < keys.end ? span.end - keys.begin : count;
        if (start >= end) continue;
        change[start]++;
        change[end]--;
      }
    }
    for (int i = 0, queries = 0; i < count; i++) {
      queries += change[i];
      seen_[i] = queries > 0;
    }
  }

  void attend_chunk(const SequenceSpans& spans, KeyRange keys, int panel) {
    const int count = keys.end - keys.begin;
    const float* query = query_ + panel * kPanel * dim_;
    for (int i = 0; i < count; i += kTileRows)
      gemm_tile(keys_ + i * dim_, dim_, 1, query, scores_ + i * kPanel, dim_, nullptr);

    if (!keys.full) hide_unseen(spans, keys, panel);

    Floats decay[kPanelVectors];
    for (int n = 0; n < kPanelVectors; n++) {
      decay[n] = softmax(scores_ + n * kLanes, count, max_ + panel * kPanel + n * kLanes,
                         sum_ + panel * kPanel + n * kLanes);
    }

    float* output = output_ + panel * kPanel * dim_;
    for (int d = 0; d < dim_; d += kTileRows)
      gemm_tile(values_ + d, 1, dim_, scores_, output + d * kPanel, count, decay);
  }

  // Sets scores of (key, query) pairs outside the query's spans to -inf.
  void hide_unseen(const SequenceSpans& spans, KeyRange keys, int panel) {
    const int count = keys.end - keys.begin;
    memset(visible_, 0, sizeof(int32_t) * count * kPanel);
    for (int r = 0; r < spans.table.count; r++) {
      alignas(64) int32_t starts[kPanel] = {}, ends[kPanel] = {};
      for (int lane = 0; lane < kPanel && panel * kPanel + lane < rows_.count; lane++) {
        const SequenceSpans::Range span = spans.at(rows_.position(panel * kPanel + lane), r);
        starts[lane] = span.start - keys.begin;
        ends[lane] = span.end - keys.begin;
      }
      for (int n = 0; n < kPanelVectors; n++) {
        const Ints start = load(starts + n * kLanes), end = load(ends + n * kLanes);
        for (int i = 0; i < count; i++) {
          int32_t* visible = visible_ + i * kPanel + n * kLanes;
          store(visible, load(visible) | ((start <= i) & (i < end)));
        }
      }
    }
    for (int i = 0; i < count * kPanel; i += kLanes)
      store(scores_ + i, select(load(visible_ + i), load(scores_ + i), Floats{} - kInfinity));
  }

  // Turns a column of scores per lane into weights 2^(score - max); returns by how much earlier weights
  // shrink (1 while the maximum stands).
  static Floats softmax(float* scores, int count, float* running_max, float* running_sum) {
    const Floats before = load(running_max);
    Floats highest = before;
    for (int i = 0; i < count; i++) highest = max(load(scores + i * kPanel), highest);
    const Floats shift = select(highest == -kInfinity, Floats{}, highest);
    const Floats decay = exp2(before - shift);
    Floats total = {};
    for (int i = 0; i < count; i++) {
      const Floats weight = exp2(load(scores + i * kPanel) - shift);
      store(scores + i * kPanel, weight);
      total += weight;
    }
    store(running_max, highest);
    store(running_sum, load(running_sum) * decay + total);
    return decay;
  }

  TileRows rows_;
  int dim_, panels_;
  float scale_;
  bool seen_[kChunk];
  alignas(64) float max_[kMaxTileQueries], sum_[kMaxTileQueries];
  alignas(64) float scores_[kChunk * kPanel];                // [key][query]
  alignas(64) int32_t visible_[kChunk * kPanel];             // [key][query], -1 or 0
  alignas(64) float query_[kMaxTileQueries * kMaxHeadDim];   // [panel][dim][query]
  alignas(64) float output_[kMaxTileQueries * kMaxHeadDim];  // [panel][dim][query]
  alignas(64) float keys_[kChunk * kMaxHeadDim], values_[kChunk * kMaxHeadDim];
};

}  // namespace dllm::cpu::DLLM_ISA
