#include "cuda/block_attention/forward.cuh"

namespace dllm::cuda {
template cudaError_t launch_forward<__half, 64>(const BlockAttentionParams&, cudaStream_t);
template cudaError_t launch_forward<__half, 128>(const BlockAttentionParams&, cudaStream_t);
template cudaError_t launch_forward<__half, 256>(const BlockAttentionParams&, cudaStream_t);
}  // namespace dllm::cuda
