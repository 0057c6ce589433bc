#include "cuda/skinny_linear/sm90/kernel.cuh"

namespace dllm::cuda::sm90 {
template cudaError_t launch_linear_kernel<__half, 8, false>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__half, 16, false>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__half, 32, false>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__half, 64, false>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__half, 8, true>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__half, 16, true>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__half, 32, true>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__half, 64, true>(const StreamedLinearParams&, cudaStream_t);
}  // namespace dllm::cuda::sm90
