// block_attention on CUDA tensors: checks, allocation and the launch on the current stream. The contents of
// spans stay on the device; the kernel cuts them to the keys there are.
#include <tuple>

#include "cuda/block_attention/launch.h"
#include "torch/attention_arguments.h"
#include "torch/cuda_launch.h"

namespace dllm {
namespace {

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

  check_launch(op, cuda::launch_block_attention(p, device.stream()));
  return {tensors.out, tensors.lse};
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) { m.impl("block_attention", TORCH_BOX(&dllm::block_attention_cuda)); }
