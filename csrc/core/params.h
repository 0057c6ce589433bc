// Parameter blocks of the kernels: plain data, filled by csrc/torch, read by CPU and CUDA kernels alike.
// Strides count elements; the last dimension of every float tensor is contiguous.
#pragma once

#include <stdint.h>

namespace dllm {

enum class DType : int32_t { float32, bfloat16, float16 };

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

}  // namespace dllm
