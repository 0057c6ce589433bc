#include "cuda/block_attention/key_gradients.cuh"
#include "cuda/block_attention/query_gradients.cuh"
#include "cuda/block_attention/query_terms.cuh"

#define DLLM_GRADIENTS(T, kDim)                                                               \
  template cudaError_t launch_key_gradients<T, kDim>(const BlockAttentionBackwardParams&,     \
                                                     const BackwardWorkspace&, cudaStream_t); \
  template cudaError_t launch_query_gradients<T, kDim>(const BlockAttentionBackwardParams&,   \
                                                       const BackwardWorkspace&, cudaStream_t)

namespace dllm::cuda {
template cudaError_t launch_query_terms<__nv_bfloat16>(const BlockAttentionBackwardParams&,
                                                       const BackwardWorkspace&, cudaStream_t);
DLLM_GRADIENTS(__nv_bfloat16, 64);
DLLM_GRADIENTS(__nv_bfloat16, 128);
DLLM_GRADIENTS(__nv_bfloat16, 256);
}  // namespace dllm::cuda
