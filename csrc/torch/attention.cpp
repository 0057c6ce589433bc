// block_attention: schema, argument checks and allocation; the CPU implementation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

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
}
