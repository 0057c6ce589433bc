// Parameter blocks of the kernels: plain data, filled by csrc/torch, read by CPU and CUDA kernels alike.
// Strides count elements; the last dimension of every float tensor is contiguous.
#pragma once

#include <limits.h>
#include <math.h>
#include <stdint.h>

#include "core/block_rows.h"
#include "core/host_device.h"
#include "core/rule.h"

namespace dllm {

enum class DType : int32_t { float32, bfloat16, float16, float64 };

// ---- attention and its cache ---------------------------------------------------------------------------

// [batch, heads, positions, head_dim]
struct HeadsLayout {
  int64_t batch_stride, head_stride, position_stride;
};

// int32 [batch, rows, count, 2], contiguous from `rows` on. data == nullptr: every row sees all keys.
struct SpanTable {
  const int32_t* data;
  int64_t batch_stride;  // 0: shared by all sequences
  int64_t row_stride;    // 0: shared by all queries of a sequence
  int32_t count;
};

struct BlockAttentionParams {
  DType dtype;
  int32_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
  float scale;
  SpanTable spans;
  const void *q, *k, *v;
  void* out;
  float* lse;  // [batch, q_heads, q_len], natural logarithm
  HeadsLayout q_layout, k_layout, v_layout, out_layout;
};

// From the gradients of out and lse to those of q, k and v.
struct BlockAttentionBackwardParams {
  BlockAttentionParams forward;  // its out and lse are read
  const void* grad_out;
  const float* grad_lse;  // [batch, q_heads, q_len], or nullptr: 0
  void *grad_q, *grad_k, *grad_v;
  HeadsLayout grad_out_layout, grad_q_layout, grad_kv_layout;
  // Where gradients of keys and values are summed up, in rows of a multiple of 32 floats: grad_k and grad_v
  // themselves where these are that.
  float *k_sums, *v_sums;
  HeadsLayout sums_layout;
  int32_t keys_per_item;  // 0: one pass over queries and keys; else a pass for dk and dv and one for dq
};

// Paged cache: [pages, page_size, kv_heads, head_dim].
struct PagesLayout {
  int64_t page_stride, slot_stride, head_stride;
};

// Every query attends to spans of its sequence's cache, then to spans of the fresh keys.
struct CachedAttentionParams {
  DType dtype;
  int32_t batch, q_heads, kv_heads, q_len, head_dim, pages, page_size;
  float scale;
  SpanTable cache_spans, fresh_spans;
  const int32_t* page_table;  // [batch, table_length]
  int32_t table_length;
  const int32_t* q_lengths;  // [batch], or nullptr: all q_len
  const void *q, *k, *v, *cache_k, *cache_v;
  void* out;
  float* lse;
  HeadsLayout q_layout, k_layout, v_layout, out_layout;
  PagesLayout cache_k_layout, cache_v_layout;
};

struct KvWriteParams {
  int32_t batch, kv_heads, length, pages, page_size, table_length;
  int64_t row_bytes;          // of one head's key or value
  const int32_t* page_table;  // [batch, table_length]
  const int32_t* positions;   // [batch, length]
  const void *k, *v;
  void *cache_k, *cache_v;
  HeadsLayout k_layout, v_layout;  // strides in bytes
  PagesLayout cache_k_layout, cache_v_layout;
};

// ---- logits ----------------------------------------------------------------------------------------------
// Row r starts at data + (r / inner) · outer_stride + (r % inner) · inner_stride, in elements.
struct LogitsView {
  void* data;
  DType type;
  int32_t inner;
  int64_t outer_stride, inner_stride;

  // Divisions are of 32 bits, and none where a row is among the first `inner`, as all rows of a matrix are.
  DLLM_HOST_DEVICE int64_t offset(int32_t row) const {
    int64_t offset = 0;
    if (row >= inner) {
      const int32_t outer = row / inner;
      offset = outer * outer_stride;
      row -= outer * inner;
    }
    return offset + row * inner_stride;
  }
};

// Ids of tokens, ascending and distinct. On the CPU a list is anywhere and of any length; on CUDA it is part
// of the kernel's arguments: no copy to the device, constant in a captured graph. What follows is written for
// either.
struct TokenIds {
  const int32_t* ids;
  int count;
};
constexpr int kMaxListedIds = 64;
struct ListedTokenIds {
  int count;
  int32_t ids[kMaxListedIds];
};

// What top-p and top-k leave of a row: x above `lowest`, and of those equal to it the ids up to `last_tie`.
struct TokenCut {
  float lowest = -HUGE_VALF;
  int32_t last_tie = INT32_MAX;
  int32_t fallback = -1;  // what is proposed where nothing that is left may be
};

// What is asked of every row, and where it goes.
template <class Ids>
struct TokenStatsParams {
  LogitsView logits;  // not of linear_token_stats
  int64_t rows;
  int32_t vocabulary;
  bool float64;  // softmax in double; noise and scores stay float

  float temperature;          // > 0 adds temperature · Gumbel noise to the score
  uint64_t seed;              // key of the noise
  const int32_t* noise_ids;   // [rows, 3]: sequence, position, step; null: (0, row, 0)
  float confidence_scale;     // 1 / confidence temperature
  double confidence_scale64;  // the same, before it was rounded
  Ids suppress;               // −inf before both
  Ids proposal_exclude;       // barred from the proposal only
  Ids confidence_exclude;     // left out of the softmax only
  int32_t fallback;           // the lowest id that may be proposed

  double top_p;    // 1: no such filter
  int32_t top_k;   // INT32_MAX: no such filter
  TokenCut* cuts;  // workspace [rows]; null: neither filter

  void* states;  // workspace: of every row a state for each of its parts, to be merged in order

  // Outputs, indexed by row; float or double as `float64` says.
  int64_t* token;
  void *prob, *margin, *entropy, *logsumexp;
};

// hidden · weightᵀ + bias
struct Projection {
  const void* hidden;  // [rows, hidden_size]
  const void* weight;  // [vocabulary, hidden_size], rows weight_stride elements apart
  const void* bias;    // [vocabulary], or null
  DType hidden_type, weight_type, bias_type;
  int32_t hidden_size;
  int64_t weight_stride;  // 0 on CUDA: a row is not contiguous
};

// out = x · weightᵀ + bias; a byte w of the weight of output n stands for w · scales[n, group].
struct SkinnyLinearParams {
  const void* x;          // [rows, inputs], contiguous
  const void* weight;     // [outputs, inputs], rows weight_stride elements apart
  const float* scales;    // [outputs, groups] of a weight in bytes, else null
  const float* x_scales;  // [rows] where x was divided by them and rounded to e4m3, else null
  const void* bias;       // [outputs], or null
  void* out;              // [rows, outputs], in x_type
  DType x_type, weight_type, bias_type;
  bool e4m3;  // a weight with scales is in e4m3 [OCP OFP8], else in int8
  int64_t rows, weight_stride;
  int32_t inputs, outputs;
  int32_t groups;  // each of inputs / groups inputs
};

// KL(p ‖ q) of the softmax distributions of two rows of logits.
template <class Ids>
struct TokenDivergenceParams {
  LogitsView logits, previous;
  int64_t rows;
  int32_t vocabulary;
  float confidence_scale;            // 1 / confidence temperature
  double confidence_scale64;         // the same, before it was rounded
  Ids suppress, confidence_exclude;  // left out of both
  bool float64;
  void* divergence;  // [rows], float or double
};

// Real: float, or double for float64 logits.
template <class Ids>
struct CrossEntropyParams {
  LogitsView logits;
  int64_t rows;
  int32_t vocabulary;
  Ids suppress;            // left out of the softmax
  const int64_t* targets;  // [rows]
  const void* weights;     // Real [rows]; a row of weight 0 is never read

  void *ce, *logsumexp;   // Real [rows]; 0 where the weight is 0
  void* loss;             // Real [], on CUDA; the CPU's binding adds it up
  const void* grad_loss;  // factor of the gradient beside the weights: double [] on the CPU, Real [] on CUDA
  void* grad;             // type of logits [rows, vocabulary]
  void* chunk_max;        // Real [rows, chunks], workspace of the CPU where gradients replace logits
};

// ---- small kernels of a layer ----------------------------------------------------------------------------
// Rows of one length; row r starts at (r / inner) · outer_stride + (r % inner) · inner_stride, in elements.
struct RowsLayout {
  int64_t inner, outer_stride, inner_stride;
  DLLM_HOST_DEVICE int64_t offset(int64_t row) const {
    return row / inner * outer_stride + row % inner * inner_stride;
  }
};

// out = weight · round(x · rsqrt(mean x² + eps)), with x = round(x + residual) where there is a residual.
// Rounding is to the storage type, once before and once after the product with weight.
struct RmsNormParams {
  DType dtype;
  int64_t rows;
  int32_t width;
  float eps;
  const void *x, *residual;  // [rows, width]; residual or null
  RowsLayout x_layout, residual_layout;
  const void* weight;  // [width]
  void *out, *sum;     // [rows, width], contiguous; sum is null where residual is
};

// From the gradient of out, and that of the sum where there is one, to those of x and weight.
struct RmsNormBackwardParams {
  DType dtype;
  int64_t rows;
  int32_t width;
  float eps;
  const void *grad, *x, *grad_sum;  // [rows, width]; grad_sum or null: 0
  RowsLayout grad_layout, x_layout, grad_sum_layout;
  const void* weight;    // [width]
  void* grad_x;          // [rows, width], contiguous
  float* weight_sums;    // workspace [ceil(rows / rows_per_sum), width], or null: no gradient of weight
  int64_t rows_per_sum;  // a function of the sizes alone
  void* grad_weight;     // [width]
};

// out = round(silu(gate)) · up
struct SiluMulParams {
  DType dtype;
  int64_t rows;
  int32_t width;
  const void *gate, *up;  // [rows, width]
  RowsLayout gate_layout, up_layout;
  void* out;  // [rows, width], contiguous; of the backward pass null
  const void* grad;
  RowsLayout grad_layout;
  void *grad_gate, *grad_up;  // [rows, width], contiguous
};

// Of query and key: out = round(x · cos) + round(rotated · sin), where rotated = (−x₂, x₁) for the halves
// x = (x₁, x₂) of a head. transposed: the gradient, out = x · cos + (y₂, −y₁) for the halves of y = x · sin.
struct RotateHalfParams {
  DType dtype;
  int32_t batch, q_heads, kv_heads, length, head_dim;
  bool transposed;
  const void *query, *key;  // [batch, heads, length, head_dim]
  HeadsLayout query_layout, key_layout;
  const void *cos, *sin;  // [batch or 1, length, head_dim]
  int64_t cos_batch_stride, cos_position_stride, sin_batch_stride, sin_position_stride;  // batch of 1: 0
  void *query_out, *key_out;
  HeadsLayout query_out_layout, key_out_layout;
};

// ---- commit and the way of rows --------------------------------------------------------------------------
struct CommitParams {
  Rule rule;
  int64_t mask_id;
  int batch, candidates;
  int64_t canvas_stride, length;
  void* canvas;  // int64 or int32 [batch, length]
  bool canvas_is_int64;
  const int32_t* positions;             // [batch, candidates], outside the canvas: none
  const int32_t* block_start;           // [batch], where positions is null: candidate c is block_start[b] + c
  const int64_t* token;                 // statistics, row b·candidates + c
  const void *prob, *margin, *entropy;  // float, or double as `float64` says
  const void* divergence;               // or null when the rule needs no stability
  bool float64;
  const int32_t* quota;         // [batch], or null when the rule has no quota
  const int32_t* step;          // [batch], null: 0
  const int32_t* sequence_ids;  // [batch], null: b
  uint64_t seed;
  int32_t* state;  // in and out [batch, length]: steps in a row that were stable; or null like divergence
  int64_t state_stride;
  bool* accepted;     // out [batch, candidates]
  int32_t* progress;  // out [batch, 2]: masks left among the listed positions, tokens changed; or null
};

constexpr int kMaxStopIds = 16;

// Moves rows, whose fields are those of core/block_rows.h.
struct AdvanceParams : BlockRowFields {
  int32_t batch, block_size, queries;
  const void* canvas;  // int64 or int32 [batch, canvas_length]
  bool canvas_is_int64;
  int64_t canvas_stride;
  int32_t canvas_length;
  int64_t mask_id, stop_ids[kMaxStopIds];
  int32_t stop_count;
  int32_t quota_total;  // what a block's quotas sum up to; 0: its masks
};

}  // namespace dllm
