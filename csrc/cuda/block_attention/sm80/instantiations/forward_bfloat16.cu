#include "cuda/block_attention/sm80/forward.cuh"

namespace dllm::cuda::sm80 {
template cudaError_t launch_forward<__nv_bfloat16, 64>(const BlockAttentionParams&, cudaStream_t);
template cudaError_t launch_forward<__nv_bfloat16, 128>(const BlockAttentionParams&, cudaStream_t);
template cudaError_t launch_forward<__nv_bfloat16, 256>(const BlockAttentionParams&, cudaStream_t);
}  // namespace dllm::cuda::sm80
