// block_attention on CUDA tensors: checks, allocation and the launch on the current stream. The contents of
// spans stay on the device; the kernel cuts them to the keys there are.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/block_attention/launch.h"
#include "torch/attention_arguments.h"

namespace dllm {
namespace {

std::tuple<Tensor, Tensor> block_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const std::optional<Tensor>& spans, double scale) {
  const char* op = "block_attention";
  check_heads(op, q, k, v);
  if (spans) check_span_tensor(op, "spans", *spans, q, true, false);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  AttentionTensors tensors(op, q, k, v, scale);
  const std::optional<Tensor> table = spans ? std::optional(torch::stable::contiguous(*spans)) : std::nullopt;

  BlockAttentionParams p;
  tensors.fill(p);
  p.kv_len = static_cast<int32_t>(k.size(2));
  p.spans = table ? span_table(*table) : kSeesAll;

  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  const cudaError_t status = cuda::launch_block_attention(p, static_cast<cudaStream_t>(stream));
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the launch failed: " + cudaGetErrorString(status));
  return {tensors.out, tensors.lse};
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CUDA, m) {
  m.impl("block_attention", TORCH_BOX(&dllm::block_attention_cuda));
}
