// Arguments of cached_block_attention and kv_write_, checked once for CPU and CUDA. What index tensors hold
// is checked on the CPU only; CUDA kernels stay inside by themselves.
#pragma once

#include "torch/attention_arguments.h"
#include "torch/overlap.h"
#include "torch/rotate_half_arguments.h"

namespace dllm {

// Strides in units of `scale` elements (the element size for strides in bytes).
inline PagesLayout pages_layout(const Tensor& cache, int64_t scale = 1) {
  return {cache.stride(0) * scale, cache.stride(1) * scale, cache.stride(2) * scale};
}

// cache_k and cache_v [pages, page_size, kv_heads, head_dim] that hold the heads of k [B, kv_heads, T, D].
inline void check_caches(const char* op, const Tensor& cache_k, const Tensor& cache_v, const Tensor& k) {
  for (const auto& [name, cache] : {std::pair<const char*, const Tensor&>{"cache_k", cache_k},
                                    std::pair<const char*, const Tensor&>{"cache_v", cache_v}}) {
    check_dims(op, name, cache, 4, "[pages, page_size, kv_heads, head_dim]");
    check_same_dtype(op, name, cache, "k", k);
    check_same_device(op, name, cache, "k", k);
    check_size(op, name, cache, 2, k.size(1), "the kv heads of k");
    check_size(op, name, cache, 3, k.size(3), "the head dim of k");
    check(cache.size(1) >= 1, op, ": ", name, " must have a page_size of at least 1, got shape ",
          shape_text(cache));
    check(cache.stride(3) == 1, op, ": ", name, " must be contiguous in its last dimension, got stride ",
          cache.stride(3));
    check_int(op, (std::string(name) + ".shape[0]").c_str(), cache.size(0));
    check_int(op, (std::string(name) + ".shape[1]").c_str(), cache.size(1));
  }
  for (int64_t dim = 0; dim < 2; dim++)
    check_size(op, "cache_v", cache_v, dim, cache_k.size(dim), "as in cache_k");
}

inline void check_page_table(const char* op, const Tensor& page_table, const Tensor& k, int64_t page_size) {
  check_dims(op, "page_table", page_table, 2, "[batch, pages]");
  check_dtype(op, "page_table", page_table, {ScalarType::Int});
  check_same_device(op, "page_table", page_table, "k", k);
  check_size(op, "page_table", page_table, 0, k.size(0), "the batch size of k");
  check_int(op, "page_table.shape[1]", page_table.size(1));
  check_int(op, "page_table.shape[1] times page_size", page_table.size(1) * page_size);
}

inline void check_cached_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cache_k, const Tensor& cache_v, const Tensor& page_table,
                                   const Tensor& cache_spans, const std::optional<Tensor>& fresh_spans,
                                   const std::optional<Tensor>& q_lengths) {
  check_heads(op, q, k, v);
  check_size(op, "k", k, 2, q.size(2), "the queries are the fresh keys");
  check_caches(op, cache_k, cache_v, k);
  check_page_table(op, page_table, k, cache_k.size(1));
  check_span_tensor(op, "cache_spans", cache_spans, q, false, true);
  if (fresh_spans) check_span_tensor(op, "fresh_spans", *fresh_spans, q, false, false);
  if (q_lengths) check_lengths(op, "q_lengths", *q_lengths, q);
}

// plan: of cached_attention_plan, `size` values. On a CPU there is nothing to plan.
inline void check_plan(const char* op, const Tensor& plan, const Tensor& q, int64_t size) {
  check_dims(op, "plan", plan, 1, "[values]");
  check_dtype(op, "plan", plan, {ScalarType::Int});
  check_same_device(op, "plan", plan, "q", q);
  check(plan.size(0) == size, op, ": plan must be what cached_attention_plan returns for these tensors, ",
        size, " values, got ", plan.size(0));
}

// The arguments of cached_attention_plan as kernels read them. Of q, k and cache_k only the sizes matter.
struct CachedPlanTensors {
  Tensor cache_spans;
  std::optional<Tensor> q_lengths;
  CachedAttentionParams params;

  CachedPlanTensors(const char* op, const Tensor& q, const Tensor& k, const Tensor& cache_k,
                    const Tensor& page_table, const Tensor& cache_spans,
                    const std::optional<Tensor>& q_lengths)
      : cache_spans(torch::stable::contiguous(cache_spans)) {
    check_cached_attention(op, q, k, k, cache_k, cache_k, page_table, cache_spans, std::nullopt, q_lengths);
    if (q_lengths) this->q_lengths = torch::stable::contiguous(*q_lengths);
    params = {};
    params.batch = static_cast<int32_t>(q.size(0)), params.q_len = static_cast<int32_t>(q.size(2));
    params.q_heads = static_cast<int32_t>(q.size(1)), params.kv_heads = static_cast<int32_t>(k.size(1));
    params.head_dim = static_cast<int32_t>(q.size(3));
    params.pages = static_cast<int32_t>(cache_k.size(0));
    params.page_size = static_cast<int32_t>(cache_k.size(1));
    params.table_length = static_cast<int32_t>(page_table.size(1));
    params.cache_spans = span_table(this->cache_spans);
    params.q_lengths = q_lengths ? this->q_lengths->const_data_ptr<int32_t>() : nullptr;
  }
};

// The arguments of cached_block_attention as kernels read them, and its outputs.
struct CachedAttentionTensors {
  AttentionTensors attention;
  Tensor cache_k, cache_v, page_table, cache_spans;
  std::optional<Tensor> fresh_spans, q_lengths;

  CachedAttentionTensors(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& cache_k, const Tensor& cache_v, const Tensor& page_table,
                         const Tensor& cache_spans, const std::optional<Tensor>& fresh_spans,
                         const std::optional<Tensor>& q_lengths, double scale)
      : attention(op, q, k, v, scale),
        cache_k(cache_k),
        cache_v(cache_v),
        page_table(torch::stable::contiguous(page_table)),
        cache_spans(torch::stable::contiguous(cache_spans)) {
    if (fresh_spans) this->fresh_spans = torch::stable::contiguous(*fresh_spans);
    if (q_lengths) this->q_lengths = torch::stable::contiguous(*q_lengths);
  }

  CachedAttentionParams params() const {
    CachedAttentionParams p;
    attention.fill(p);
    p.pages = static_cast<int32_t>(cache_k.size(0));
    p.page_size = static_cast<int32_t>(cache_k.size(1));
    p.table_length = static_cast<int32_t>(page_table.size(1));
    p.cache_spans = span_table(cache_spans);
    p.fresh_spans = fresh_spans ? span_table(*fresh_spans) : kSeesAll;
    p.page_table = page_table.const_data_ptr<int32_t>();
    p.q_lengths = q_lengths ? q_lengths->const_data_ptr<int32_t>() : nullptr;
    p.cache_k = cache_k.const_data_ptr();
    p.cache_v = cache_v.const_data_ptr();
    p.cache_k_layout = pages_layout(cache_k);
    p.cache_v_layout = pages_layout(cache_v);
    return p;
  }
};

// The arguments of kv_write_ as kernels read them.
struct KvWriteTensors {
  Tensor cache_k, cache_v, k, v, page_table, positions;

  KvWriteTensors(const char* op, const Tensor& cache_k, const Tensor& cache_v, const Tensor& key,
                 const Tensor& value, const Tensor& page_table, const Tensor& positions)
      : cache_k(cache_k), cache_v(cache_v) {
    check_dims(op, "k", key, 4, "[batch, kv_heads, tokens, head_dim]");
    check_float(op, "k", key);
    check_dims(op, "v", value, 4, "[batch, kv_heads, tokens, head_dim]");
    check_same_dtype(op, "v", value, "k", key);
    check_same_device(op, "v", value, "k", key);
    for (int64_t dim = 0; dim < 4; dim++) check_size(op, "v", value, dim, key.size(dim), "as in k");
    check_caches(op, cache_k, cache_v, key);
    check_page_table(op, page_table, key, cache_k.size(1));
    check_dims(op, "positions", positions, 2, "[batch, tokens]");
    check_dtype(op, "positions", positions, {ScalarType::Int});
    check_same_device(op, "positions", positions, "k", key);
    check_size(op, "positions", positions, 0, key.size(0), "the batch size of k");
    check_size(op, "positions", positions, 1, key.size(2), "the tokens of k");
    for (int64_t dim = 0; dim < 3; dim++) check_int(op, "every size of k", key.size(dim));
    check_written(op, {{"cache_k", cache_k}, {"cache_v", cache_v}},
                  {{"k", key}, {"v", value}, {"page_table", page_table}, {"positions", positions}});
    k = with_contiguous_rows(key);
    v = with_contiguous_rows(value);
    this->page_table = torch::stable::contiguous(page_table);
    this->positions = torch::stable::contiguous(positions);
  }

  KvWriteParams params() const {
    const auto bytes = static_cast<int64_t>(k.element_size());
    const auto in_bytes = [&](const Tensor& rows) -> HeadsLayout {
      return {rows.stride(0) * bytes, rows.stride(1) * bytes, rows.stride(2) * bytes};
    };
    KvWriteParams p;
    p.batch = static_cast<int32_t>(k.size(0));
    p.kv_heads = static_cast<int32_t>(k.size(1));
    p.length = static_cast<int32_t>(k.size(2));
    p.pages = static_cast<int32_t>(cache_k.size(0));
    p.page_size = static_cast<int32_t>(cache_k.size(1));
    p.table_length = static_cast<int32_t>(page_table.size(1));
    p.row_bytes = k.size(3) * bytes;
    p.page_table = page_table.const_data_ptr<int32_t>();
    p.positions = positions.const_data_ptr<int32_t>();
    p.k = k.const_data_ptr();
    p.v = v.const_data_ptr();
    p.cache_k = cache_k.mutable_data_ptr();
    p.cache_v = cache_v.mutable_data_ptr();
    p.k_layout = in_bytes(k);
    p.v_layout = in_bytes(v);
    p.cache_k_layout = pages_layout(cache_k, bytes);
    p.cache_v_layout = pages_layout(cache_v, bytes);
    return p;
  }
};

// What attend_and_write_ has beside the arguments of cached_block_attention and kv_write_, which check
// theirs.
inline void check_attend_and_write(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cache_k, const Tensor& cache_v, const Tensor& page_table,
                                   const Tensor& cache_spans, const std::optional<Tensor>& cos,
                                   const std::optional<Tensor>& sin, const std::optional<Tensor>& positions,
                                   const std::optional<Tensor>& fresh_spans,
                                   const std::optional<Tensor>& q_lengths,
                                   const std::optional<Tensor>& plan) {
  check(cos.has_value() == sin.has_value(), op, ": cos and sin must both be given, or neither");
  if (cos) {
    check(q.size(3) % 2 == 0, op, ": head_dim must be even, got ", q.size(3));
    check_angles(op, "cos", *cos, "q", q);
    check_angles(op, "sin", *sin, "q", q);
  }
  if (!positions) return;
  std::vector<Argument> read = {
      {"q", q}, {"k", k}, {"v", v}, {"page_table", page_table}, {"cache_spans", cache_spans}};
  const std::pair<const char*, const std::optional<Tensor>&> optional[] = {{"cos", cos},
                                                                           {"sin", sin},
                                                                           {"positions", positions},
                                                                           {"fresh_spans", fresh_spans},
                                                                           {"q_lengths", q_lengths},
                                                                           {"plan", plan}};
  for (const auto& [name, tensor] : optional)
    if (tensor) read.push_back({name, *tensor});
  check_written(op, {{"cache_k", cache_k}, {"cache_v", cache_v}}, read);
}

}  // namespace dllm
