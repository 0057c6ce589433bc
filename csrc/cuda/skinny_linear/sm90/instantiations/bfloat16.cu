#include "cuda/skinny_linear/sm90/kernel.cuh"

namespace dllm::cuda::sm90 {
template cudaError_t launch_linear_kernel<__nv_bfloat16, 8>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__nv_bfloat16, 16>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__nv_bfloat16, 32>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__nv_bfloat16, 64>(const StreamedLinearParams&, cudaStream_t);
}  // namespace dllm::cuda::sm90
