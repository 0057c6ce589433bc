#include "cuda/block_attention/plain_backward.cuh"
#include "cuda/block_attention/plain_forward.cuh"
#include "cuda/block_attention/query_terms.cuh"

#define DLLM_PLAIN(kDim)                                                                      \
  template cudaError_t launch_plain_forward<kDim>(const BlockAttentionParams&, cudaStream_t); \
  template cudaError_t launch_plain_backward<kDim>(const BlockAttentionBackwardParams&,       \
                                                   const BackwardWorkspace&, cudaStream_t)

namespace dllm::cuda {
template cudaError_t launch_query_terms<float>(const BlockAttentionBackwardParams&, const BackwardWorkspace&,
                                               cudaStream_t);
DLLM_PLAIN(64);
DLLM_PLAIN(128);
DLLM_PLAIN(256);
}  // namespace dllm::cuda
