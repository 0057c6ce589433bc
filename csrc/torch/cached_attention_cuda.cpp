// cached_block_attention, its plan, kv_write_, and attend_and_write_ on CUDA tensors: allocation and launches
// on the current stream. What index tensors hold stays on the device; the kernels cut spans, lengths and
// pages to what there is.
#include <tuple>

#include "cuda/cached_attention/launch.h"
#include "cuda/kv_write/launch.h"
#include "cuda/rotate_half/launch.h"
#include "torch/cached_attention_arguments.h"
#include "torch/cuda_launch.h"
#include "torch/host_copies.h"

namespace dllm {
namespace {

// Other inputs are copied where they have to be; a cache cannot be.
void check_aligned(const char* op, const char* name, const Tensor& cache) {
  const auto bytes = static_cast<int64_t>(cache.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < 3; dim++)
    aligned &= cache.size(dim) <= 1 || cache.stride(dim) * bytes % 16 == 0;
  check(aligned, op, ": ", name, " must start every row of a head at a multiple of 16 bytes on CUDA");
}

// An empty plan with room for all values of one.
Tensor new_plan(const Tensor& like, const CachedAttentionParams& p) {
  return torch::stable::new_empty(like, {cuda::plan_size(p)}, ScalarType::Int);
}

Tensor cached_attention_plan_cuda(const Tensor& q, const Tensor& k, const Tensor& cache_k,
                                  const Tensor& page_table, const Tensor& cache_spans,
                                  const std::optional<Tensor>& q_lengths) {
  const char* op = "cached_attention_plan";
  const CachedPlanTensors tensors(op, q, k, cache_k, page_table, cache_spans, q_lengths);
  const OnDeviceOf device(q);
  Tensor plan = new_plan(q, tensors.params);
  check_launch(op, cuda::launch_plan(tensors.params, plan.mutable_data_ptr<int32_t>(), device.stream()));
  return plan;
}

// rotation, writes: where the kernel takes fresh tokens.
std::tuple<Tensor, Tensor> attend(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& cache_k, const Tensor& cache_v, const Tensor& page_table,
                                  const Tensor& cache_spans, const std::optional<Tensor>& fresh_spans,
                                  const std::optional<Tensor>& q_lengths, double scale,
                                  const std::optional<Tensor>& given_plan,
                                  const cuda::Rotation& rotation = {}, const cuda::FreshWrites& writes = {}) {
  check_cached_attention(op, q, k, v, cache_k, cache_v, page_table, cache_spans, fresh_spans, q_lengths);
  check_aligned(op, "cache_k", cache_k);
  check_aligned(op, "cache_v", cache_v);
  const OnDeviceOf device(q);
  const CachedAttentionTensors tensors(op, with_aligned_rows(q), with_aligned_rows(k), with_aligned_rows(v),
                                       cache_k, cache_v, page_table, cache_spans, fresh_spans, q_lengths,
                                       scale);
  cuda::SplitParams p;
  p.attention = tensors.params();
  p.rotation = rotation;
  p.writes = writes;
  if (debugging()) {
    HostCopies host;
    CachedAttentionParams copy = p.attention;
    copy.page_table = host.of(tensors.page_table);
    copy.cache_spans.data = host.of(tensors.cache_spans);
    copy.fresh_spans.data = host.of(tensors.fresh_spans);
    copy.q_lengths = host.of(tensors.q_lengths);
    check_contents(op, copy);
  }
  if (given_plan) check_plan(op, *given_plan, q, cuda::plan_size(p.attention));
  Tensor plan = given_plan ? with_aligned_rows(*given_plan) : new_plan(q, p.attention);
  p.plan = cuda::plan_at(plan.mutable_data_ptr<int32_t>(), p.attention);
  if (!given_plan) {
    check_launch(op, cuda::launch_plan(p.attention, plan.mutable_data_ptr<int32_t>(), device.stream()));
  }
  cuda::plan_splits(p);
  const int64_t rows = q.size(0) * p.partial_rows;
  Tensor sums = torch::stable::new_empty(q, {rows, q.size(3)}, ScalarType::Float);
  Tensor states = torch::stable::new_empty(q, {rows, 2}, ScalarType::Float);
  p.sums = sums.mutable_data_ptr<float>();
  p.states = reinterpret_cast<float2*>(states.mutable_data_ptr<float>());
  check_launch(op, cuda::launch_cached_attention(p, device.stream()));
  return {tensors.attention.out, tensors.attention.lse};
}

void check_written_contents(const char* op, const KvWriteTensors& tensors) {
  HostCopies host;
  KvWriteParams copy = tensors.params();
  copy.page_table = host.of(tensors.page_table);
  copy.positions = host.of(tensors.positions);
  check_contents(op, copy);
}

void check_written_unseen(const char* op, const KvWriteTensors& tensors, const Tensor& cache_spans,
                          const std::optional<Tensor>& q_lengths) {
  HostCopies host;
  KvWriteParams copy = tensors.params();
  copy.page_table = host.of(tensors.page_table);
  copy.positions = host.of(tensors.positions);
  const Tensor spans = torch::stable::contiguous(cache_spans);
  SpanTable table = span_table(spans);
  table.data = host.of(spans);
  check_unseen(op, copy, table,
               host.of(q_lengths ? std::optional(torch::stable::contiguous(*q_lengths)) : std::nullopt));
}

void kv_write_cuda(Tensor cache_k, Tensor cache_v, const Tensor& k, const Tensor& v, const Tensor& page_table,
                   const Tensor& positions) {
  const char* op = "kv_write_";
  const KvWriteTensors tensors(op, cache_k, cache_v, k, v, page_table, positions);
  const OnDeviceOf device(cache_k);
  if (debugging()) check_written_contents(op, tensors);
  check_launch(op, cuda::launch_kv_write(tensors.params(), device.stream()));
}

std::tuple<Tensor, Tensor> cached_block_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                       const Tensor& cache_k, const Tensor& cache_v,
                                                       const Tensor& page_table, const Tensor& cache_spans,
                                                       const std::optional<Tensor>& fresh_spans,
                                                       const std::optional<Tensor>& q_lengths, double scale,
                                                       const std::optional<Tensor>& plan) {
  return attend("cached_block_attention", q, k, v, cache_k, cache_v, page_table, cache_spans, fresh_spans,
                q_lengths, scale, plan);
}

// One kernel where it takes fresh tokens, else one after the other.
std::tuple<Tensor, Tensor> attend_and_write_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
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
  const OnDeviceOf device(q);
  const bool together = cuda::takes_fresh_tokens(storage_type(q), q.size(3), cos.has_value());

  Tensor query = q, key = k, cos_rows, sin_rows, places;
  cuda::Rotation rotation{};
  if (cos && together) {
    cos_rows = with_aligned_rows(*cos), sin_rows = with_aligned_rows(*sin);
    rotation = {cos_rows.data_ptr(),
                sin_rows.data_ptr(),
                cos->size(0) == 1 ? 0 : cos_rows.stride(0),
                cos_rows.stride(1),
                sin->size(0) == 1 ? 0 : sin_rows.stride(0),
                sin_rows.stride(1)};
  } else if (cos) {
    const RotateHalfTensors rotated(op, {"q", "k"}, q, k, *cos, *sin, false);
    check_launch(op, cuda::launch_rotate_half(rotated.params, device.stream()));
    query = rotated.query_out, key = rotated.key_out;
  }
  cuda::FreshWrites writes{};
  if (positions) {
    const KvWriteTensors written(op, cache_k, cache_v, k, v, page_table, *positions);
    if (debugging()) {
      check_written_contents(op, written);
      check_written_unseen(op, written, cache_spans, q_lengths);
    }
    places = written.positions;
    writes = {places.const_data_ptr<int32_t>(), cache_k.mutable_data_ptr(), cache_v.mutable_data_ptr()};
  }
  auto result = attend(op, query, key, v, cache_k, cache_v, page_table, cache_spans, fresh_spans, q_lengths,
                       scale, plan, rotation, together ? writes : cuda::FreshWrites{});
  if (positions && !together) {
    const KvWriteTensors written(op, cache_k, cache_v, key, v, page_table, *positions);
    check_launch(op, cuda::launch_kv_write(written.params(), device.stream()));
  }
  return result;
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) {
  m.impl("cached_block_attention", TORCH_BOX(&dllm::cached_block_attention_cuda));
  m.impl("cached_attention_plan", TORCH_BOX(&dllm::cached_attention_plan_cuda));
  m.impl("attend_and_write_", TORCH_BOX(&dllm::attend_and_write_cuda));
  m.impl("kv_write_", TORCH_BOX(&dllm::kv_write_cuda));
}
