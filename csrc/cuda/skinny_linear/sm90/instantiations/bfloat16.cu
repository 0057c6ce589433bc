#include "cuda/skinny_linear/sm90/kernel.cuh"

namespace dllm::cuda::sm90 {
template cudaError_t launch_linear_kernel<__nv_bfloat16, 8, false>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__nv_bfloat16, 16, false>(const StreamedLinearParams&,
                                                                    cudaStream_t);
template cudaError_t launch_linear_kernel<__nv_bfloat16, 32, false>(const StreamedLinearParams&,
                                                                    cudaStream_t);
template cudaError_t launch_linear_kernel<__nv_bfloat16, 64, false>(const StreamedLinearParams&,
                                                                    cudaStream_t);
template cudaError_t launch_linear_kernel<__nv_bfloat16, 8, true>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__nv_bfloat16, 16, true>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__nv_bfloat16, 32, true>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__nv_bfloat16, 64, true>(const StreamedLinearParams&, cudaStream_t);
}  // namespace dllm::cuda::sm90
