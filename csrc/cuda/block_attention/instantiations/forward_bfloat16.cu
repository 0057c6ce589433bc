#include "cuda/block_attention/forward.cuh"

namespace dllm::cuda {
template cudaError_t launch_forward<__nv_bfloat16, 64>(const BlockAttentionParams&, cudaStream_t);
template cudaError_t launch_forward<__nv_bfloat16, 128>(const BlockAttentionParams&, cudaStream_t);
template cudaError_t launch_forward<__nv_bfloat16, 256>(const BlockAttentionParams&, cudaStream_t);
}  // namespace dllm::cuda
