#include "cuda/block_attention/backward_preprocess.cuh"
#include "cuda/block_attention/fp32/backward.cuh"
#include "cuda/block_attention/fp32/forward.cuh"

#define DLLM_FP32(kDim)                                                                                     \
  template cudaError_t launch_forward<kDim>(const BlockAttentionParams&, cudaStream_t);                     \
  template cudaError_t launch_backward<kDim>(const BlockAttentionBackwardParams&, const BackwardWorkspace&, \
                                             cudaStream_t)

namespace dllm::cuda {
template cudaError_t launch_backward_preprocess<float>(const BlockAttentionBackwardParams&,
                                                       const BackwardWorkspace&, cudaStream_t);
}  // namespace dllm::cuda

namespace dllm::cuda::fp32 {
DLLM_FP32(64);
DLLM_FP32(128);
DLLM_FP32(256);
}  // namespace dllm::cuda::fp32
