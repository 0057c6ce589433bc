// cached_block_attention and kv_write_: schemas, argument checks and allocation; the CPU implementations.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "cpu/cached_attention.h"
#include "cpu/kv_write.h"
#include "torch/attention_arguments.h"
#include "torch/cache_arguments.h"
#include "torch/parallel.h"

namespace dllm {
namespace {

// Every page that a live query's spans touch exists.
void check_pages(const char* op, const CachedAttentionParams& p, int64_t pages, int64_t table_length) {
  std::vector<int> change(table_length + 1);
  for (int64_t b = 0; b < p.batch; b++) {
    std::fill(change.begin(), change.end(), 0);
    const int64_t live = p.q_lengths ? p.q_lengths[b] : p.q_len;
    for (int64_t row = 0; row < (p.cache_spans.row_stride ? live : std::min<int64_t>(live, 1)); row++) {
      const int32_t* span =
          p.cache_spans.data + b * p.cache_spans.batch_stride + row * p.cache_spans.row_stride;
      for (int32_t r = 0; r < p.cache_spans.count; r++, span += 2) {
        if (span[0] == span[1]) continue;
        change[span[0] / p.page_size]++;
        change[(span[1] - 1) / p.page_size + 1]--;
      }
    }
    int users = 0;
    for (int64_t entry = 0; entry < table_length; entry++) {
      users += change[entry];
      if (users) check_page(op, p.page_table + b * p.page_table_stride, b, entry, pages);
    }
  }
}

std::tuple<Tensor, Tensor> cached_block_attention_cpu(const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& cache_k,
                                                      const Tensor& cache_v, const Tensor& page_table,
                                                      const Tensor& cache_spans,
                                                      const std::optional<Tensor>& fresh_spans,
                                                      const std::optional<Tensor>& q_lengths, double scale) {
  const char* op = "cached_block_attention";
  check_heads(op, query, key, value);
  check_size(op, "k", key, 2, query.size(2), "the queries are the fresh keys");
  check_caches(op, cache_k, cache_v, key);
  check_page_table(op, page_table, key, cache_k.size(1));
  check_span_tensor(op, "cache_spans", cache_spans, query, false, true);
  if (fresh_spans) check_span_tensor(op, "fresh_spans", *fresh_spans, query, false, false);
  if (q_lengths) check_lengths(op, "q_lengths", *q_lengths, query);

  AttentionTensors tensors(op, query, key, value, scale);
  const Tensor table = torch::stable::contiguous(page_table);
  const Tensor spans = torch::stable::contiguous(cache_spans);
  std::optional<Tensor> fresh, lengths;
  if (fresh_spans) fresh = torch::stable::contiguous(*fresh_spans);
  if (q_lengths) lengths = torch::stable::contiguous(*q_lengths);

  CachedAttentionParams p;
  tensors.fill(p);
  p.page_size = static_cast<int32_t>(cache_k.size(1));
  p.cache_spans = span_table(spans);
  p.fresh_spans = fresh ? span_table(*fresh) : kSeesAll;
  p.page_table = table.const_data_ptr<int32_t>();
  p.page_table_stride = table.size(1);
  p.q_lengths = lengths ? lengths->const_data_ptr<int32_t>() : nullptr;
  p.cache_k = cache_k.const_data_ptr();
  p.cache_v = cache_v.const_data_ptr();
  p.cache_k_layout = pages_layout(cache_k);
  p.cache_v_layout = pages_layout(cache_v);

  for (int64_t b = 0; p.q_lengths && b < p.batch; b++) {
    check(0 <= p.q_lengths[b] && p.q_lengths[b] <= p.q_len, op, ": q_lengths[", b, "] must be from 0 to ",
          p.q_len, ", got ", p.q_lengths[b]);
  }
  check_spans(op, "cache_spans", p.cache_spans, p.batch, p.q_len, table.size(1) * p.page_size, p.q_lengths);
  if (fresh) check_spans(op, "fresh_spans", p.fresh_spans, p.batch, p.q_len, p.q_len, p.q_lengths);
  check_pages(op, p, cache_k.size(0), table.size(1));

  run_items(cpu::attention_items(p), 2.0 * query.numel() * (p.q_len + table.size(1) * p.page_size),
            [&](int64_t begin, int64_t end) { cpu::cached_block_attention(p, begin, end); });
  return {tensors.out, tensors.lse};
}

// What is written to one slot does not appear in another, as in a cache that was expanded.
void check_slots_apart(const char* op, const char* name, const Tensor& cache) {
  for (int64_t dim = 0; dim < 3; dim++)
    check(cache.size(dim) <= 1 || cache.stride(dim) != 0, op, ": ", name, " must not be expanded, but its ",
          "stride is 0 in dimension ", dim);
}

void kv_write_cpu(Tensor cache_k, Tensor cache_v, const Tensor& key, const Tensor& value,
                  const Tensor& page_table, const Tensor& positions) {
  const char* op = "kv_write_";
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
  check_slots_apart(op, "cache_k", cache_k);
  check_slots_apart(op, "cache_v", cache_v);

  const Tensor k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  const Tensor table = torch::stable::contiguous(page_table), where = torch::stable::contiguous(positions);
  const int64_t bytes = static_cast<int64_t>(key.element_size());
  KvWriteParams p;
  p.batch = static_cast<int32_t>(k.size(0));
  p.kv_heads = static_cast<int32_t>(k.size(1));
  p.length = static_cast<int32_t>(k.size(2));
  p.page_size = static_cast<int32_t>(cache_k.size(1));
  p.row_bytes = k.size(3) * bytes;
  p.page_table = table.const_data_ptr<int32_t>();
  p.positions = where.const_data_ptr<int32_t>();
  p.page_table_stride = table.size(1);
  p.positions_stride = where.size(1);
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.cache_k = cache_k.mutable_data_ptr();
  p.cache_v = cache_v.mutable_data_ptr();
  p.k_layout = {k.stride(0) * bytes, k.stride(1) * bytes, k.stride(2) * bytes};
  p.v_layout = {v.stride(0) * bytes, v.stride(1) * bytes, v.stride(2) * bytes};
  p.cache_k_layout = pages_layout(cache_k, bytes);
  p.cache_v_layout = pages_layout(cache_v, bytes);

  const int64_t slots = table.size(1) * p.page_size;
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t t = 0; t < p.length; t++) {
      const int32_t position = p.positions[b * p.positions_stride + t];
      check(-1 <= position && position < slots, op, ": positions[", b, ", ", t,
            "] must be -1 (skip) or a position from 0 to ", slots - 1, ", got ", position);
      if (position >= 0)
        check_page(op, p.page_table + b * p.page_table_stride, b, position / p.page_size, cache_k.size(0));
    }
  }
  run_items(p.kv_heads, 2.0 * k.numel(), [&](int64_t begin, int64_t end) { cpu::kv_write(p, begin, end); });
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def(
      "cached_block_attention(Tensor q, Tensor k, Tensor v, Tensor cache_k, Tensor cache_v, Tensor "
      "page_table, "
      "Tensor cache_spans, Tensor? fresh_spans, Tensor? q_lengths, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "kv_write_(Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor k, Tensor v, Tensor page_table, "
      "Tensor positions) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("cached_block_attention", TORCH_BOX(&dllm::cached_block_attention_cpu));
  m.impl("kv_write_", TORCH_BOX(&dllm::kv_write_cpu));
}
