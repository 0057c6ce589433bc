// cached_block_attention, its plan, kv_write_, and attend_and_write_: schemas and CPU implementations, which
// check what index tensors hold.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/cached_attention.h"
#include "cpu/kv_write.h"
#include "cpu/rotate_half.h"
#include "torch/cached_attention_arguments.h"
#include "torch/index_checks.h"
#include "torch/parallel.h"

namespace dllm {
namespace {

// With fewer tiles threads share the ranges of a tile, so that all of them have work to the end.
constexpr int64_t kTilesPerThread = 4;

std::tuple<Tensor, Tensor> attend(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& cache_k, const Tensor& cache_v, const Tensor& page_table,
                                  const Tensor& cache_spans, const std::optional<Tensor>& fresh_spans,
                                  const std::optional<Tensor>& q_lengths, double scale,
                                  const std::optional<Tensor>& plan) {
  check_cached_attention(op, q, k, v, cache_k, cache_v, page_table, cache_spans, fresh_spans, q_lengths);
  if (plan) check_plan(op, *plan, q, 0);
  const CachedAttentionTensors tensors(op, q, k, v, cache_k, cache_v, page_table, cache_spans, fresh_spans,
                                       q_lengths, scale);
  cpu::CachedAttentionItems p{tensors.params(), nullptr};
  check_contents(op, p);

  Tensor states;
  if (p.ranges() > 1 && p.tiles() < kTilesPerThread * torch::stable::get_num_threads()) {
    states = torch::stable::new_empty(q, {p.tiles() * p.ranges() * p.state_floats()}, ScalarType::Float);
    p.states = static_cast<float*>(states.data_ptr());
  }
  const int64_t keys = p.q_len + static_cast<int64_t>(p.table_length) * p.page_size;
  run_items(p.items(), 2.0 * q.numel() * keys,
            [&](int64_t begin, int64_t end) { cpu::cached_block_attention(p, begin, end); });
  if (p.states) {
    run_items(p.tiles(), 4.0 * p.tiles() * p.ranges() * p.state_floats(),
              [&](int64_t begin, int64_t end) { cpu::merge_cached_attention(p, begin, end); });
  }
  return {tensors.attention.out, tensors.attention.lse};
}

Tensor cached_attention_plan_cpu(const Tensor& q, const Tensor& k, const Tensor& cache_k,
                                 const Tensor& page_table, const Tensor& cache_spans,
                                 const std::optional<Tensor>& q_lengths) {
  const CachedPlanTensors checked("cached_attention_plan", q, k, cache_k, page_table, cache_spans, q_lengths);
  return torch::stable::new_empty(q, {0}, ScalarType::Int);
}

void write(const char* op, const Tensor& cache_k, const Tensor& cache_v, const Tensor& k, const Tensor& v,
           const Tensor& page_table, const Tensor& positions) {
  const KvWriteTensors tensors(op, cache_k, cache_v, k, v, page_table, positions);
  const KvWriteParams p = tensors.params();
  check_contents(op, p);
  run_items(p.kv_heads, 2.0 * k.numel(), [&](int64_t begin, int64_t end) { cpu::kv_write(p, begin, end); });
}

std::tuple<Tensor, Tensor> cached_block_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& cache_k, const Tensor& cache_v,
                                                      const Tensor& page_table, const Tensor& cache_spans,
                                                      const std::optional<Tensor>& fresh_spans,
                                                      const std::optional<Tensor>& q_lengths, double scale,
                                                      const std::optional<Tensor>& plan) {
  return attend("cached_block_attention", q, k, v, cache_k, cache_v, page_table, cache_spans, fresh_spans,
                q_lengths, scale, plan);
}

void kv_write_cpu(Tensor cache_k, Tensor cache_v, const Tensor& k, const Tensor& v, const Tensor& page_table,
                  const Tensor& positions) {
  write("kv_write_", cache_k, cache_v, k, v, page_table, positions);
}

// One after the other.
std::tuple<Tensor, Tensor> attend_and_write_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                Tensor cache_k, Tensor cache_v, const Tensor& page_table,
                                                const Tensor& cache_spans, const std::optional<Tensor>& cos,
                                                const std::optional<Tensor>& sin,
                                                const std::optional<Tensor>& positions,
                                                const std::optional<Tensor>& fresh_spans,
                                                const std::optional<Tensor>& q_lengths, double scale,
                                                const std::optional<Tensor>& plan) {
  const char* op = "attend_and_write_";
  check_cached_attention(op, q, k, v, cache_k, cache_v, page_table, cache_spans, fresh_spans, q_lengths);
  check_attend_and_write(op, q, k, v, cache_k, cache_v, page_table, cache_spans, cos, sin, positions,
                         fresh_spans, q_lengths, plan);
  if (positions) {
    const KvWriteTensors written(op, cache_k, cache_v, k, v, page_table, *positions);
    const Tensor spans = torch::stable::contiguous(cache_spans);
    const Tensor lengths = q_lengths ? torch::stable::contiguous(*q_lengths) : Tensor();
    check_contents(op, written.params());
    check_unseen(op, written.params(), span_table(spans),
                 q_lengths ? lengths.const_data_ptr<int32_t>() : nullptr);
  }
  Tensor query = q, key = k;
  if (cos) {
    const RotateHalfTensors rotated(op, {"q", "k"}, q, k, *cos, *sin, false);
    const RotateHalfParams& p = rotated.params;
    run_items(static_cast<int64_t>(p.batch) * p.length, 4.0 * (q.numel() + k.numel()),
              [&](int64_t begin, int64_t end) { cpu::rotate_half(p, begin, end); });
    query = rotated.query_out, key = rotated.key_out;
  }
  auto result = attend(op, query, key, v, cache_k, cache_v, page_table, cache_spans, fresh_spans, q_lengths,
                       scale, plan);
  if (positions) write(op, cache_k, cache_v, key, v, page_table, *positions);
  return result;
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def(
      "cached_block_attention(Tensor q, Tensor k, Tensor v, Tensor cache_k, Tensor cache_v, Tensor "
      "page_table, "
      "Tensor cache_spans, Tensor? fresh_spans, Tensor? q_lengths, float scale, Tensor? plan=None) -> "
      "(Tensor "
      "out, Tensor lse)");
  m.def(
      "cached_attention_plan(Tensor q, Tensor k, Tensor cache_k, Tensor page_table, Tensor cache_spans, "
      "Tensor? q_lengths) -> Tensor");
  m.def(
      "attend_and_write_(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor "
      "page_table, Tensor cache_spans, Tensor? cos, Tensor? sin, Tensor? positions, Tensor? fresh_spans, "
      "Tensor? q_lengths, float scale, Tensor? plan=None) -> (Tensor out, Tensor lse)");
  m.def(
      "kv_write_(Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor k, Tensor v, Tensor page_table, "
      "Tensor positions) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("cached_block_attention", TORCH_BOX(&dllm::cached_block_attention_cpu));
  m.impl("cached_attention_plan", TORCH_BOX(&dllm::cached_attention_plan_cpu));
  m.impl("attend_and_write_", TORCH_BOX(&dllm::attend_and_write_cpu));
  m.impl("kv_write_", TORCH_BOX(&dllm::kv_write_cpu));
}
