#include "cuda/block_attention/sm90/key_gradients.cuh"
#include "cuda/block_attention/sm90/query_gradients.cuh"

namespace dllm::cuda::sm90 {
template cudaError_t launch_key_gradients_kernel<__nv_bfloat16, 64>(const GradientParams&, cudaStream_t);
template cudaError_t launch_key_gradients_kernel<__nv_bfloat16, 128>(const GradientParams&, cudaStream_t);
template cudaError_t launch_query_gradients_kernel<__nv_bfloat16, 64>(const GradientParams&, cudaStream_t);
template cudaError_t launch_query_gradients_kernel<__nv_bfloat16, 128>(const GradientParams&, cudaStream_t);
}  // namespace dllm::cuda::sm90
