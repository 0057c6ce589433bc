// block_attention: schema, argument checks and allocation; the CPU implementation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "torch/attention_arguments.h"
#include "torch/index_checks.h"
#include "torch/parallel.h"

namespace dllm {
namespace {

std::tuple<Tensor, Tensor> block_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const std::optional<Tensor>& spans, double scale) {
  const char* op = "block_attention";
  check_heads(op, q, k, v);
  if (spans) check_span_tensor(op, "spans", *spans, q, true, false);
  AttentionTensors tensors(op, q, k, v, scale);
  const std::optional<Tensor> table = spans ? std::optional(torch::stable::contiguous(*spans)) : std::nullopt;

  BlockAttentionParams p;
  tensors.fill(p);
  p.kv_len = static_cast<int32_t>(k.size(2));
  p.spans = table ? span_table(*table) : kSeesAll;
  check_spans(op, "spans", p.spans, p.batch, p.q_len, p.kv_len);

  run_items(cpu::attention_items(p), 2.0 * q.numel() * p.kv_len,
            [&](int64_t begin, int64_t end) { cpu::block_attention_forward(p, begin, end); });
  return {tensors.out, tensors.lse};
}

// 0, one pass, unless so few heads leave threads idle that two passes are done sooner.
int32_t backward_keys_per_item(const BlockAttentionParams& p) {
  constexpr int32_t kKeys = 256, kOnePass = 5, kTwoPasses = 7;
  const int64_t heads = static_cast<int64_t>(p.batch) * p.kv_heads,
                threads = torch::stable::get_num_threads();
  return (heads + threads - 1) / threads * threads * kOnePass <= heads * kTwoPasses ? 0 : kKeys;
}

std::tuple<Tensor, Tensor, Tensor> block_attention_backward_cpu(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& output, const Tensor& logsumexp, const std::optional<Tensor>& spans,
    double scale) {
  const char* op = "block_attention_backward";
  const BackwardTensors tensors(op, with_contiguous_rows, grad_out, grad_lse, query, key, value, output,
                                logsumexp, spans, scale);
  BlockAttentionBackwardParams p;
  tensors.fill(p);
  if (tensors.spans)
    check_spans(op, "spans", p.forward.spans, p.forward.batch, p.forward.q_len, p.forward.kv_len);
  p.keys_per_item = backward_keys_per_item(p.forward);

  const Tensor& k = tensors.k;
  const int64_t width =
      (k.size(3) + cpu::kGradientRowMultiple - 1) / cpu::kGradientRowMultiple * cpu::kGradientRowMultiple;
  const bool in_place = p.forward.dtype == DType::float32 && width == k.size(3);
  const auto sums = [&](const Tensor& grads) {
    return in_place
               ? grads
               : torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2), width}, ScalarType::Float);
  };
  const Tensor k_sums = sums(tensors.grad_k), v_sums = sums(tensors.grad_v);
  p.k_sums = k_sums.mutable_data_ptr<float>();
  p.v_sums = v_sums.mutable_data_ptr<float>();
  p.sums_layout = heads_layout(k_sums);

  run_items(cpu::attention_items(p), 5.0 * tensors.q.numel() * p.forward.kv_len,
            [&](int64_t begin, int64_t end) { cpu::block_attention_backward(p, begin, end); });
  return {tensors.grad_q, tensors.grad_k, tensors.grad_v};
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def(
      "block_attention(Tensor q, Tensor k, Tensor v, Tensor? spans, float scale) -> (Tensor out, Tensor "
      "lse)");
  m.def(
      "block_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? spans, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("block_attention", TORCH_BOX(&dllm::block_attention_cpu));
  m.impl("block_attention_backward", TORCH_BOX(&dllm::block_attention_backward_cpu));
}
