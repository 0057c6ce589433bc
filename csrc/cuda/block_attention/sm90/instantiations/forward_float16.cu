#include "cuda/block_attention/sm90/forward.cuh"

namespace dllm::cuda::sm90 {
template cudaError_t launch_forward_kernel<__half, 64>(const ForwardParams&, int, cudaStream_t);
template cudaError_t launch_forward_kernel<__half, 128>(const ForwardParams&, int, cudaStream_t);
}  // namespace dllm::cuda::sm90
