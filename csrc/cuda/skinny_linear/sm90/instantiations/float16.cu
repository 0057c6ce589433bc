#include "cuda/skinny_linear/sm90/kernel.cuh"

namespace dllm::cuda::sm90 {
template cudaError_t launch_linear_kernel<__half, 8>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__half, 16>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__half, 32>(const StreamedLinearParams&, cudaStream_t);
template cudaError_t launch_linear_kernel<__half, 64>(const StreamedLinearParams&, cudaStream_t);
}  // namespace dllm::cuda::sm90
