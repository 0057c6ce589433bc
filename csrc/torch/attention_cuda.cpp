// block_attention on CUDA tensors: checks, allocation and launches on the current stream. The contents of
// spans stay on the device; the kernels cut them to the keys there are.
#include <tuple>

#include "cuda/block_attention/launch.h"
#include "torch/attention_arguments.h"
#include "torch/cuda_launch.h"
#include "torch/host_copies.h"

namespace dllm {
namespace {

// With DLLM_DEBUG=1.
void check_span_copies(const char* op, const std::optional<Tensor>& table, const BlockAttentionParams& p) {
  if (!table || !debugging()) return;
  HostCopies host;
  SpanTable spans = p.spans;
  spans.data = host.of(*table);
  check_spans(op, "spans", spans, p.batch, p.q_len, p.kv_len);
}

std::tuple<Tensor, Tensor> block_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const std::optional<Tensor>& spans, double scale) {
  const char* op = "block_attention";
  check_heads(op, q, k, v);
  if (spans) check_span_tensor(op, "spans", *spans, q, true, false);
  const OnDeviceOf device(q);
  AttentionTensors tensors(op, with_aligned_rows(q), with_aligned_rows(k), with_aligned_rows(v), scale);
  const std::optional<Tensor> table = spans ? std::optional(torch::stable::contiguous(*spans)) : std::nullopt;

  BlockAttentionParams p;
  tensors.fill(p);
  p.kv_len = static_cast<int32_t>(k.size(2));
  p.spans = table ? span_table(*table) : kSeesAll;
  check_span_copies(op, table, p);

  check_launch(op, cuda::launch_block_attention(p, device.stream()));
  return {tensors.out, tensors.lse};
}

std::tuple<Tensor, Tensor, Tensor> block_attention_backward_cuda(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& spans, double scale) {
  const char* op = "block_attention_backward";
  const BackwardTensors tensors(op, with_aligned_rows, grad_out, grad_lse, q, k, v, out, lse, spans, scale);
  const OnDeviceOf device(q);
  BlockAttentionBackwardParams p;
  tensors.fill(p);

  cuda::BackwardWorkspace workspace = cuda::backward_workspace(p);
  const int64_t terms = cuda::workspace_terms(p.forward, workspace) * 2;
  const int64_t bounds = cuda::workspace_bounds(p.forward, workspace) * 4;
  const Tensor term_memory = torch::stable::new_empty(lse, {terms}, ScalarType::Float);
  const Tensor bound_memory = torch::stable::new_empty(lse, {bounds}, ScalarType::Int);
  workspace.terms = reinterpret_cast<float2*>(term_memory.mutable_data_ptr<float>());
  workspace.bounds = reinterpret_cast<SpanBounds*>(bound_memory.mutable_data_ptr<int32_t>());
  check_launch(op, cuda::launch_block_attention_backward(p, workspace, device.stream()));
  return {tensors.grad_q, tensors.grad_k, tensors.grad_v};
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) {
  m.impl("block_attention", TORCH_BOX(&dllm::block_attention_cuda));
  m.impl("block_attention_backward", TORCH_BOX(&dllm::block_attention_backward_cuda));
}
