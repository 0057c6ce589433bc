// block_attention: schema, argument checks and allocation; the CPU implementation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "torch/attention_arguments.h"
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
  if (table) check_spans(op, "spans", p.spans, p.batch, p.q_len, p.kv_len);

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
  check_heads(op, query, key, value);
  if (spans) check_span_tensor(op, "spans", *spans, query, true, false);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"grad_out", grad_out},
                                     std::pair<const char*, const Tensor&>{"out", output}}) {
    check_dims(op, name, tensor, 4, "[batch, heads, queries, head_dim]");
    check_same_dtype(op, name, tensor, "q", query);
    check_same_device(op, name, tensor, "q", query);
    for (int64_t dim = 0; dim < 4; dim++) check_size(op, name, tensor, dim, query.size(dim), "as in q");
  }
  check_lse(op, "lse", logsumexp, query);
  if (grad_lse) check_lse(op, "grad_lse", *grad_lse, query);

  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key),
               v = with_contiguous_rows(value);
  const Tensor out = with_contiguous_rows(output), grad = with_contiguous_rows(grad_out);
  const Tensor lse = torch::stable::contiguous(logsumexp);
  std::optional<Tensor> table, lse_grad;
  if (spans) table = torch::stable::contiguous(*spans);
  if (grad_lse) lse_grad = torch::stable::contiguous(*grad_lse);
  const Tensor grad_q = new_heads(q), grad_k = new_heads(k), grad_v = new_heads(k);

  BlockAttentionBackwardParams p;
  fill_inputs(p.forward, q, k, v, checked_scale(op, scale));
  p.forward.kv_len = static_cast<int32_t>(k.size(2));
  p.forward.spans = table ? span_table(*table) : kSeesAll;
  if (table) check_spans(op, "spans", p.forward.spans, p.forward.batch, p.forward.q_len, p.forward.kv_len);
  p.forward.out = const_cast<void*>(out.const_data_ptr());
  p.forward.out_layout = heads_layout(out);
  p.forward.lse = const_cast<float*>(lse.const_data_ptr<float>());
  p.grad_out = grad.const_data_ptr();
  p.grad_out_layout = heads_layout(grad);
  p.grad_lse = lse_grad ? lse_grad->const_data_ptr<float>() : nullptr;
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_q_layout = heads_layout(grad_q);
  p.grad_kv_layout = heads_layout(grad_k);
  p.keys_per_item = backward_keys_per_item(p.forward);

  const int64_t width =
      (k.size(3) + cpu::kGradientRowMultiple - 1) / cpu::kGradientRowMultiple * cpu::kGradientRowMultiple;
  const bool in_place = p.forward.dtype == DType::float32 && width == k.size(3);
  const auto sums = [&](const Tensor& grads) {
    return in_place
               ? grads
               : torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2), width}, ScalarType::Float);
  };
  const Tensor k_sums = sums(grad_k), v_sums = sums(grad_v);
  p.k_sums = k_sums.mutable_data_ptr<float>();
  p.v_sums = v_sums.mutable_data_ptr<float>();
  p.sums_layout = heads_layout(k_sums);

  run_items(cpu::attention_items(p), 5.0 * q.numel() * p.forward.kv_len,
            [&](int64_t begin, int64_t end) { cpu::block_attention_backward(p, begin, end); });
  return {grad_q, grad_k, grad_v};
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
