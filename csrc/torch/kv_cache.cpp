// cached_block_attention and kv_write_: schemas and CPU implementations, which check what index tensors hold.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "cpu/cached_attention.h"
#include "cpu/kv_write.h"
#include "torch/cache_arguments.h"
#include "torch/parallel.h"

namespace dllm {
namespace {

void check_page(const char* op, const int32_t* table, int64_t b, int64_t entry, int64_t pages) {
  check(0 <= table[entry] && table[entry] < pages, op, ": page_table[", b, ", ", entry,
        "] must be a page from 0 to ", pages - 1, ", got ", table[entry]);
}

// Every page that a live query's spans touch exists.
void check_pages(const char* op, const CachedAttentionParams& p) {
  std::vector<int> change(p.table_length + 1);
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
    for (int64_t entry = 0; entry < p.table_length; entry++) {
      users += change[entry];
      if (users) check_page(op, p.page_table + b * p.table_length, b, entry, p.pages);
    }
  }
}

std::tuple<Tensor, Tensor> cached_block_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& cache_k, const Tensor& cache_v,
                                                      const Tensor& page_table, const Tensor& cache_spans,
                                                      const std::optional<Tensor>& fresh_spans,
                                                      const std::optional<Tensor>& q_lengths, double scale) {
  const char* op = "cached_block_attention";
  check_cached_attention(op, q, k, v, cache_k, cache_v, page_table, cache_spans, fresh_spans, q_lengths);
  const CachedAttentionTensors tensors(op, q, k, v, cache_k, cache_v, page_table, cache_spans, fresh_spans,
                                       q_lengths, scale);
  const CachedAttentionParams p = tensors.params();

  for (int64_t b = 0; p.q_lengths && b < p.batch; b++) {
    check(0 <= p.q_lengths[b] && p.q_lengths[b] <= p.q_len, op, ": q_lengths[", b, "] must be from 0 to ",
          p.q_len, ", got ", p.q_lengths[b]);
  }
  const int64_t slots = static_cast<int64_t>(p.table_length) * p.page_size;
  check_spans(op, "cache_spans", p.cache_spans, p.batch, p.q_len, slots, p.q_lengths);
  if (fresh_spans) check_spans(op, "fresh_spans", p.fresh_spans, p.batch, p.q_len, p.q_len, p.q_lengths);
  check_pages(op, p);

  run_items(cpu::attention_items(p), 2.0 * q.numel() * (p.q_len + slots),
            [&](int64_t begin, int64_t end) { cpu::cached_block_attention(p, begin, end); });
  return {tensors.attention.out, tensors.attention.lse};
}

void kv_write_cpu(Tensor cache_k, Tensor cache_v, const Tensor& k, const Tensor& v, const Tensor& page_table,
                  const Tensor& positions) {
  const char* op = "kv_write_";
  const KvWriteTensors tensors(op, cache_k, cache_v, k, v, page_table, positions);
  const KvWriteParams p = tensors.params();

  const int64_t slots = static_cast<int64_t>(p.table_length) * p.page_size;
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t t = 0; t < p.length; t++) {
      const int32_t position = p.positions[b * p.length + t];
      check(-1 <= position && position < slots, op, ": positions[", b, ", ", t,
            "] must be -1 (skip) or a position from 0 to ", slots - 1, ", got ", position);
      if (position >= 0)
        check_page(op, p.page_table + b * p.table_length, b, position / p.page_size, p.pages);
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
