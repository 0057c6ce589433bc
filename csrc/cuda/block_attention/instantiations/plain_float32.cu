#include "cuda/block_attention/plain_forward.cuh"

namespace dllm::cuda {
template cudaError_t launch_plain_forward<64>(const BlockAttentionParams&, cudaStream_t);
template cudaError_t launch_plain_forward<128>(const BlockAttentionParams&, cudaStream_t);
template cudaError_t launch_plain_forward<256>(const BlockAttentionParams&, cudaStream_t);
}  // namespace dllm::cuda
