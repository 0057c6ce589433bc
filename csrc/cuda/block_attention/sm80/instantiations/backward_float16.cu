#include "cuda/block_attention/backward_preprocess.cuh"
#include "cuda/block_attention/sm80/backward_dkv.cuh"
#include "cuda/block_attention/sm80/backward_dq.cuh"

#define DLLM_BACKWARD(T, kDim)                                                               \
  template cudaError_t launch_backward_dkv<T, kDim>(const BlockAttentionBackwardParams&,     \
                                                    const BackwardWorkspace&, cudaStream_t); \
  template cudaError_t launch_backward_dq<T, kDim>(const BlockAttentionBackwardParams&,      \
                                                   const BackwardWorkspace&, cudaStream_t)

namespace dllm::cuda {
template cudaError_t launch_backward_preprocess<__half>(const BlockAttentionBackwardParams&,
                                                        const BackwardWorkspace&, cudaStream_t);
}  // namespace dllm::cuda

namespace dllm::cuda::sm80 {
DLLM_BACKWARD(__half, 64);
DLLM_BACKWARD(__half, 128);
DLLM_BACKWARD(__half, 256);
}  // namespace dllm::cuda::sm80
