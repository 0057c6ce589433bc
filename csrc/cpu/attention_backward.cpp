#include "cpu/attention_backward.h"

#include "cpu/attention_tile.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

// What a work item computes: gradients that tiles [first_tile, last_tile) of queries and keys
// [first_key, last_key) of a sequence and kv head get from each other.
struct Work {
  int batch, kv_head;
  int first_tile, last_tile, first_key, last_key;
  bool for_queries, for_keys;
};

Work work_of(const BlockAttentionBackwardParams& p, int64_t item) {
  const BlockAttentionParams& f = p.forward;
  const auto at = [&](int64_t head) { return std::pair<int, int>(head / f.kv_heads, head % f.kv_heads); };
  const int tiles = static_cast<int>(attention_tiles(kGradientTileRows, f.q_heads / f.kv_heads, f.q_len));
  if (p.keys_per_item == 0) {
    const auto [batch, kv_head] = at(item);
    return {batch, kv_head, 0, tiles, 0, f.kv_len, true, true};
  }
  const int64_t ranges = key_ranges(p), key_items = ranges * f.batch * f.kv_heads;
  if (item < key_items) {
    const auto [batch, kv_head] = at(item / ranges);
    const int first = static_cast<int>(item % ranges) * p.keys_per_item;
    return {batch, kv_head, 0, tiles, first, clamp(f.kv_len - first, 0, p.keys_per_item) + first,
            false, true};
  }
  const auto [batch, kv_head] = at((item - key_items) / tiles);
  const int tile = tiles - 1 - static_cast<int>((item - key_items) % tiles);
  return {batch, kv_head, tile, tile + 1, 0, f.kv_len, true, false};
}

// `count`: whole vectors.
float dot(const float* a, const float* b, int count) {
  Floats sums = {};
  for (int i = 0; i < count; i += kLanes) sums += load(a + i) * load(b + i);
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
  return sum;
}

static_assert(kGradientTileRows <= kMaxTileQueries);

// A tile of queries, as columns (for products that give scores) and as rows (for sums over queries).
// With P = 2^(scale log2e k·q - log2e lse) and dS = P (v·dO - dO·O + dlse), all [key][query]:
// dV += P dO, dK += scale dS Q, dQᵀ += scale Kᵀ dS.
class GradientTile {
 public:
  GradientTile(const BlockAttentionBackwardParams& p) : p_(p), dim_(p.forward.head_dim) {}

  template <typename T>
  void set_queries(const TileItem& at) {
    const BlockAttentionParams& f = p_.forward;
    rows_ = at.rows;
    columns_ = rows_.panels() * kPanel;
    for (int first = 0; first < rows_.count; first += kPanel) {
      const TileRows panel = tile_rows(rows_.first + first, kPanel, rows_.group, f.q_len);
      panel_spans_[first / kPanel] = TileSpans({f.spans, at.batch, f.kv_len}, panel);
    }
    const auto query = [&](int i) { return at.row<const T>(f.q, f.q_layout, i); };
    const auto grad = [&](int i) { return at.row<const T>(p_.grad_out, p_.grad_out_layout, i); };
    const auto out = [&](int i) { return at.row<const T>(f.out, f.out_layout, i); };
    widen_rows<T>(out, rows_.count, dim_, 1.0f, query_rows_);
    widen_rows<T>(grad, rows_.count, dim_, 1.0f, grad_rows_);
    for (int i = 0; i < columns_; i++) {
      shift_[i] = row_sum_[i] = 0.0f;
      if (i >= rows_.count) continue;
      const int64_t index = at.lse_index(i, f.q_heads, f.q_len);
      shift_[i] = f.lse[index] == -kInfinity ? 0.0f : f.lse[index] * kLog2E;
      row_sum_[i] = dot(query_rows_ + i * padded(dim_), grad_rows_ + i * padded(dim_), padded(dim_));
      if (p_.grad_lse) row_sum_[i] -= p_.grad_lse[index];
    }
    widen_rows<T>(query, rows_.count, dim_, f.scale * kLog2E, query_rows_);
    for (int first = 0; first < columns_; first += kPanel) {
      transpose(query_rows_ + first * padded(dim_), padded(dim_), kPanel, dim_, query_ + first * dim_,
                kPanel);
      transpose(grad_rows_ + first * padded(dim_), padded(dim_), kPanel, dim_, grad_ + first * dim_, kPanel);
    }
    widen_rows<T>(query, rows_.count, dim_, f.scale, query_rows_);
    memset(grad_query_, 0, sizeof(float) * columns_ * dim_);
  }

  // Takes in a chunk of keys; k and v are their rows.
  void attend(KeyRange keys, const float* k, const float* v, bool for_queries) {
    first_panel_ = rows_.panels();
    last_panel_ = 0;
    for (int panel = 0; panel < rows_.panels(); panel++) {
      const TileSpans& spans = panel_spans_[panel];
      int done = keys.begin;
      for (KeyRange seen = spans.next(done, keys.end - done); seen.begin < seen.end && seen.begin < keys.end;
           seen = spans.next(seen.end, keys.end - done)) {
        seen.end = clamp(seen.end, 0, keys.end);
        clear_scores(panel, done - keys.begin, seen.begin - keys.begin);
        done = seen.end;
        const long offset = seen.begin - keys.begin;
        compute_scores(panel, seen, offset, k + offset * dim_, v + offset * dim_);
        if (for_queries) add_to_queries(panel, offset, seen.end - seen.begin, k + offset * dim_);
        if (panel < first_panel_) first_panel_ = panel;
        last_panel_ = panel + 1;
      }
      clear_scores(panel, done - keys.begin, keys.end - keys.begin);
    }
  }

  // From the chunk that was taken in last into rows of gradients of its keys and values.
  void add_to_keys(int count, float* grad_k, float* grad_v, long stride) const {
    const int first = first_panel_ * kPanel, last = clamp(last_panel_ * kPanel, 0, rows_.count);
    const Left weights{weights_ + first, columns_, 1}, grads{grad_scores_ + first, columns_, 1};
    const float *queries = query_rows_ + first * padded(dim_), *outs = grad_rows_ + first * padded(dim_);
    for (int d = 0; d < dim_; d += kPanel) {
      gemm(weights, {outs + d, padded(dim_)}, {grad_v + d, stride}, count, last - first, kAccumulate);
      gemm(grads, {queries + d, padded(dim_)}, {grad_k + d, stride}, count, last - first, kAccumulate);
    }
  }

  template <typename T>
  void store_grad_query(const TileItem& at) {
    for (int first = 0; first < columns_; first += kPanel)
      transpose(grad_query_ + first * dim_, kPanel, dim_, kPanel, query_rows_ + first * padded(dim_),
                padded(dim_));
    for (int i = 0; i < rows_.count; i++)
      narrow_row(query_rows_ + i * padded(dim_), at.row<T>(p_.grad_q, p_.grad_q_layout, i), dim_,
                 p_.forward.scale);
  }

 private:
  // P and dS of a panel with `keys`, which stand at row `offset` of the chunk.
  void compute_scores(int panel, KeyRange keys, long offset, const float* k, const float* v) {
    const int count = keys.end - keys.begin, first = panel * kPanel;
    float *weights = weights_ + offset * columns_ + first, *grads = grad_scores_ + offset * columns_ + first;
    gemm({k, dim_, 1}, {query_ + first * dim_, kPanel}, {weights, columns_}, count, dim_, kOverwrite);
    gemm({v, dim_, 1}, {grad_ + first * dim_, kPanel}, {grads, columns_}, count, dim_, kOverwrite);
    if (!keys.full) panel_spans_[panel].mark_visible(keys, 0, visible_);
    for (int i = 0; i < count; i++, weights += columns_, grads += columns_) {
      for (int n = 0; n < kPanel; n += kLanes) {
        Floats weight = exp2(load(weights + n) - load(shift_ + first + n));
        Floats grad = weight * (load(grads + n) - load(row_sum_ + first + n));
        if (!keys.full) {
          const Ints visible = load(visible_ + i * kPanel + n);
          weight = select(visible, weight, Floats{});
          grad = select(visible, grad, Floats{});
        }
        store(weights + n, weight);
        store(grads + n, grad);
      }
    }
  }

  // Keys [begin, end) of the chunk are not seen by any query of the panel.
  void clear_scores(int panel, int begin, int end) {
    for (int i = begin; i < end; i++) {
      memset(weights_ + i * columns_ + panel * kPanel, 0, sizeof(float) * kPanel);
      memset(grad_scores_ + i * columns_ + panel * kPanel, 0, sizeof(float) * kPanel);
    }
  }

  void add_to_queries(int panel, long offset, int count, const float* k) {
    const int first = panel * kPanel;
    gemm({k, 1, dim_}, {grad_scores_ + offset * columns_ + first, columns_},
         {grad_query_ + first * dim_, kPanel}, dim_, count, kAccumulate);
  }

  const BlockAttentionBackwardParams& p_;
  TileRows rows_;
  int dim_, columns_;
  int first_panel_, last_panel_;  // those of the chunk's scores that are not all 0
  TileSpans panel_spans_[kMaxTileQueries / kPanel];
  alignas(64) float shift_[kMaxTileQueries];    // log2(e) times lse
  alignas(64) float row_sum_[kMaxTileQueries];  // dO·O - dlse
  alignas(64) float query_[kMaxHeadDim * kMaxTileQueries], grad_[kMaxHeadDim * kMaxTileQueries];  // columns
  alignas(64) float query_rows_[kMaxTileQueries * kMaxHeadDim], grad_rows_[kMaxTileQueries * kMaxHeadDim];
  alignas(64) float grad_query_[kMaxHeadDim * kMaxTileQueries];  // columns
  alignas(64) float weights_[kMaxChunk * kMaxTileQueries], grad_scores_[kMaxChunk * kMaxTileQueries];
  alignas(64) int32_t visible_[kMaxChunk * kPanel];
};

template <typename T>
class WorkItem {
 public:
  WorkItem(const BlockAttentionBackwardParams& p, const Work& work)
      : p_(p), f_(p.forward), work_(work), tile_(p) {}

  void compute() {
    if (work_.for_keys) clear_sums();
    for (int t = work_.first_tile; t < work_.last_tile; t++) {
      const int group = f_.q_heads / f_.kv_heads;
      visit(
          {tile_rows(t * kGradientTileRows, kGradientTileRows, group, f_.q_len), work_.batch, work_.kv_head});
    }
    if (work_.for_keys && p_.k_sums != p_.grad_k) narrow_sums();
  }

 private:
  void visit(const TileItem& at) {
    const TileSpans spans({f_.spans, at.batch, f_.kv_len}, at.rows);
    const int limit = chunk_keys(f_.head_dim);
    const auto next = [&](int from) {
      KeyRange keys = spans.next(from, limit);
      keys.end = clamp(keys.end, 0, work_.last_key);
      return keys;
    };
    KeyRange keys = next(work_.first_key);
    if (keys.begin >= keys.end) {
      for (int i = 0; work_.for_queries && i < at.rows.count; i++)
        memset(at.row<T>(p_.grad_q, p_.grad_q_layout, i), 0, sizeof(T) * f_.head_dim);
      return;
    }
    tile_.template set_queries<T>(at);
    for (; keys.begin < keys.end; keys = next(keys.end)) add_chunk(at, spans, keys);
    if (work_.for_queries) tile_.template store_grad_query<T>(at);
  }

  void add_chunk(const TileItem& at, const TileSpans& spans, KeyRange keys) {
    const bool dense =
        f_.k_layout.position_stride == f_.head_dim && f_.v_layout.position_stride == f_.head_dim;
    const bool* seen = keys.full || spans.mark_seen(keys, seen_) ? nullptr : seen_;
    const auto k_row = [&](int key) { return at.key<const T>(f_.k, f_.k_layout, key); };
    const auto v_row = [&](int key) { return at.key<const T>(f_.v, f_.v_layout, key); };
    const float* k = float_rows<T>(k_row, dense, keys, seen, f_.head_dim, keys_);
    const float* v = float_rows<T>(v_row, dense, keys, seen, f_.head_dim, values_);
    tile_.attend(keys, k, v, work_.for_queries);
    if (work_.for_keys)
      tile_.add_to_keys(keys.end - keys.begin, sum(p_.k_sums, keys.begin), sum(p_.v_sums, keys.begin),
                        p_.sums_layout.position_stride);
  }

  void clear_sums() {
    for (int key = work_.first_key; key < work_.last_key; key++) {
      memset(sum(p_.k_sums, key), 0, sizeof(float) * padded(f_.head_dim));
      memset(sum(p_.v_sums, key), 0, sizeof(float) * padded(f_.head_dim));
    }
  }

  void narrow_sums() {
    const TileItem at{{}, work_.batch, work_.kv_head};
    for (int key = work_.first_key; key < work_.last_key; key++) {
      narrow_row(sum(p_.k_sums, key), at.key<T>(p_.grad_k, p_.grad_kv_layout, key), f_.head_dim);
      narrow_row(sum(p_.v_sums, key), at.key<T>(p_.grad_v, p_.grad_kv_layout, key), f_.head_dim);
    }
  }

  float* sum(float* sums, int key) const {
    return TileItem{{}, work_.batch, work_.kv_head}.key<float>(sums, p_.sums_layout, key);
  }

  const BlockAttentionBackwardParams& p_;
  const BlockAttentionParams& f_;
  const Work work_;
  GradientTile tile_;
  bool seen_[kMaxChunk];
  alignas(64) float keys_[kMaxChunkFloats], values_[kMaxChunkFloats];
};

}  // namespace

void block_attention_backward(const BlockAttentionBackwardParams& p, long begin, long end) {
  with_storage_type(p.forward.dtype, [&]<class T>(T) {
    for (long item = begin; item < end; item++) WorkItem<T>(p, work_of(p, item)).compute();
  });
}

}  // namespace dllm::cpu::DLLM_ISA
