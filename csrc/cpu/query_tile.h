// A tile of queries that attends to the keys its spans show, chunk by chunk, with an online softmax.
// Queries are columns throughout (one SIMD lane each): scores are K·Qᵀ, the output is accumulated as
// Vᵀ·P, and the softmax needs no horizontal step. Scores are in base 2: log2(e) is folded into Q.
#pragma once

#include "core/softmax_state.h"
#include "cpu/attention_tile.h"

namespace dllm::cpu::DLLM_ISA {

// Rows that are read next, and are brought into the second level of cache while products are computed: a line
// of memory every second step, since more at a time than the processor keeps in flight would make it wait.
class RowsAhead {
 public:
  void clear() { rows_ = next_ = 0; }
  template <typename T>
  void set_rows(int dim) {
    lines_ = (dim * static_cast<int>(sizeof(T)) + kLine - 1) / kLine;
  }
  void add(const void* row) { data_[rows_++] = static_cast<const char*>(row); }

  DLLM_SIMD void fetch(int step) {
    if (step % 2 || next_ == rows_) return;
    __builtin_prefetch(data_[next_] + line_ * kLine, 0, kSecondLevel);
    if (++line_ == lines_) line_ = 0, next_++;
  }

 private:
  static constexpr int kLine = 64, kSecondLevel = 2;
  const char* data_[2 * kMaxChunk];
  int rows_ = 0, next_ = 0, line_ = 0, lines_ = 1;
};
struct FetchAhead {
  RowsAhead* rows;
  DLLM_SIMD void operator()(int step) const { rows->fetch(step); }
};

class QueryTile {
 public:
  QueryTile(TileRows rows, int head_dim, float scale) : rows_(rows), dim_(head_dim), scale_(scale) {
    forget();
  }

  // No keys have been attended to.
  void forget() {
    memset(output_, 0, sizeof(float) * columns() * dim_);
    for (int i = 0; i < columns(); i++) {
      max_[i] = -kInfinity;
      sum_[i] = 0.0f;
    }
  }

  // row(i) finds row i of the tile.
  template <typename T, typename Row>
  void set_queries(Row row) {
    for (int first = 0; first < rows_.count; first += kPanel) {
      const auto panel_row = [&](int i) { return row(first + i); };
      widen_rows<T>(panel_row, clamp(rows_.count - first, 0, kPanel), dim_, scale_ * kLog2E, panel_rows_);
      transpose(panel_rows_, padded(dim_), kPanel, dim_, query_ + first * dim_, kPanel);
    }
  }

  // Attends to keys `first` … `end` - 1. k_row(key) and v_row(key) find the rows of a key and its value;
  // `dense`: neighbours follow each other.
  template <typename T, typename KRow, typename VRow>
  void attend(const SequenceSpans& sequence, bool dense, KRow k_row, VRow v_row, int first = 0,
              int end = INT_MAX) {
    const TileSpans spans(sequence, rows_);
    const int limit = chunk_keys(dim_), panels = rows_.panels();
    ahead_.set_rows<T>(dim_);
    const auto next_before_end = [&](int from) {
      KeyRange keys = spans.next(from, limit);
      keys.begin = keys.begin < end ? keys.begin : end;
      keys.end = keys.end < end ? keys.end : end;
      return keys;
    };
    for (KeyRange next, keys = next_before_end(first); keys.begin < keys.end; keys = next) {
      next = next_before_end(keys.end);
      const bool* seen = keys.full || spans.mark_seen(keys, seen_) ? nullptr : seen_;
      const float* k = float_rows<T>(k_row, dense, keys, seen, dim_, keys_);
      const float* v = float_rows<T>(v_row, dense, keys, seen, dim_, values_);
      ahead_.clear();
      if (!dense) {  // dense rows are fetched ahead by the processor
        for (int key = next.begin; key < next.end; key++) ahead_.add(k_row(key)), ahead_.add(v_row(key));
      }
      for (int panel = 0; panel < panels; panel++) attend_chunk(spans, keys, k, v, panel);
    }
  }

  // The state after some keys: a maximum and a sum for each column, and the weighted values
  // [panel][dim][query].
  static int64_t state_size(int columns, int dim) { return int64_t{columns} * (dim + 2); }
  void save(float* state) const {
    memcpy(state, max_, sizeof(float) * columns());
    memcpy(state + columns(), sum_, sizeof(float) * columns());
    memcpy(state + 2 * columns(), output_, sizeof(float) * columns() * dim_);
  }
  void restore(const float* state) {
    memcpy(max_, state, sizeof(float) * columns());
    memcpy(sum_, state + columns(), sizeof(float) * columns());
    memcpy(output_, state + 2 * columns(), sizeof(float) * columns() * dim_);
  }
  // `state`: of the keys before; `more`: of other keys.
  void merge(float* state, const float* more) const {
    for (int first = 0; first < columns(); first += kLanes) {
      const Floats before = load(state + first), other = load(more + first), highest = max(before, other);
      const Floats shift = select(highest == -kInfinity, Floats{}, highest);
      const Floats keep = exp2(before - shift), take = exp2(other - shift);
      store(state + first, highest);
      float *sum = state + columns() + first, *output = state + 2 * columns();
      store(sum, load(sum) * keep + load(more + columns() + first) * take);
      const int64_t place = int64_t{first} / kPanel * kPanel * dim_ + first % kPanel;
      for (int d = 0; d < dim_; d++) {
        float* to = output + place + d * kPanel;
        store(to, load(to) * keep + load(more + 2 * columns() + place + d * kPanel) * take);
      }
    }
  }

  // row(i) and lse(i) find where the results of row i belong.
  template <typename T, typename Row, typename Lse>
  void store_outputs(Row row, Lse lse) {
    for (int first = 0; first < rows_.count; first += kPanel) {
      transpose(output_ + first * dim_, kPanel, dim_, kPanel, panel_rows_, padded(dim_));
      for (int i = first; i < clamp(first + kPanel, 0, rows_.count); i++) {
        const SoftmaxState state{max_[i], sum_[i]};
        *lse(i) = state.log_sum_exp();
        if (state.sum == 0.0f) memset(row(i), 0, sizeof(T) * dim_);
        else narrow_row(panel_rows_ + (i - first) * padded(dim_), row(i), dim_, state.inverse_sum());
      }
    }
  }

 private:
  int columns() const { return rows_.panels() * kPanel; }

  void attend_chunk(const TileSpans& spans, KeyRange keys, const float* k, const float* v, int panel) {
    const int count = keys.end - keys.begin;
    const float* query = query_ + panel * kPanel * dim_;
    gemm({k, dim_, 1}, {query, kPanel}, {scores_, kPanel}, count, dim_, kOverwrite, FetchAhead{&ahead_});

    if (!keys.full) {
      spans.mark_visible(keys, panel * kPanel, visible_);
      for (int i = 0; i < count * kPanel; i += kLanes)
        store(scores_ + i, select(load(visible_ + i), load(scores_ + i), Floats{} - kInfinity));
    }
    Floats decay[kPanelVectors];
    softmax(scores_, count, max_ + panel * kPanel, sum_ + panel * kPanel, decay);

    float* output = output_ + panel * kPanel * dim_;
    gemm({v, 1, dim_}, {scores_, kPanel}, {output, kPanel}, dim_, count, decay, FetchAhead{&ahead_});
  }

  // Turns a column of scores per lane into weights 2^(score - max); decay: by how much earlier weights
  // shrink (1 while the maximum stands).
  static void softmax(float* scores, int count, float* running_max, float* running_sum, Floats* decay) {
    Floats highest[kPanelVectors], total[kPanelVectors] = {};
    for (int n = 0; n < kPanelVectors; n++) highest[n] = load(running_max + n * kLanes);
    for (int i = 0; i < count; i++) {
      for (int n = 0; n < kPanelVectors; n++)
        highest[n] = max(load(scores + i * kPanel + n * kLanes), highest[n]);
    }
    for (int n = 0; n < kPanelVectors; n++) {
      const Floats before = load(running_max + n * kLanes);
      store(running_max + n * kLanes, highest[n]);
      highest[n] = select(highest[n] == -kInfinity, Floats{}, highest[n]);
      decay[n] = exp2(before - highest[n]);
    }
    for (int i = 0; i < count; i++) {
      for (int n = 0; n < kPanelVectors; n++) {
        float* score = scores + i * kPanel + n * kLanes;
        const Floats weight = exp2(load(score) - highest[n]);
        store(score, weight);
        total[n] += weight;
      }
    }
    for (int n = 0; n < kPanelVectors; n++) {
      float* sum = running_sum + n * kLanes;
      store(sum, load(sum) * decay[n] + total[n]);
    }
  }

  TileRows rows_;
  int dim_;
  float scale_;
  bool seen_[kMaxChunk];
  RowsAhead ahead_;
  alignas(64) float max_[kMaxTileQueries], sum_[kMaxTileQueries];
  alignas(64) float scores_[kMaxChunk * kPanel];             // [key][query]
  alignas(64) int32_t visible_[kMaxChunk * kPanel];          // [key][query], -1 or 0
  alignas(64) float query_[kMaxTileQueries * kMaxHeadDim];   // [panel][dim][query]
  alignas(64) float output_[kMaxTileQueries * kMaxHeadDim];  // [panel][dim][query]
  alignas(64) float panel_rows_[kPanel * kMaxHeadDim];       // queries or outputs of a panel
  alignas(64) float keys_[kMaxChunkFloats], values_[kMaxChunkFloats];
};

}  // namespace dllm::cpu::DLLM_ISA
