#include "cuda/block_attention/sm90/backward_dkv.cuh"
#include "cuda/block_attention/sm90/backward_dq.cuh"

namespace dllm::cuda::sm90 {
template cudaError_t launch_backward_dkv_kernel<__nv_bfloat16, 64>(const GradientParams&, cudaStream_t);
template cudaError_t launch_backward_dkv_kernel<__nv_bfloat16, 128>(const GradientParams&, cudaStream_t);
template cudaError_t launch_backward_dq_kernel<__nv_bfloat16, 64>(const GradientParams&, cudaStream_t);
template cudaError_t launch_backward_dq_kernel<__nv_bfloat16, 128>(const GradientParams&, cudaStream_t);
}  // namespace dllm::cuda::sm90
