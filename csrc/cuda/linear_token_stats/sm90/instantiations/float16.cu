#include "cuda/linear_token_stats/sm90/kernel.cuh"

namespace dllm::cuda::sm90 {
template cudaError_t launch_linear_states_kernel<__half, 8>(const LinearStatesParams&, cudaStream_t);
template cudaError_t launch_linear_states_kernel<__half, 16>(const LinearStatesParams&, cudaStream_t);
template cudaError_t launch_linear_states_kernel<__half, 32>(const LinearStatesParams&, cudaStream_t);
template cudaError_t launch_linear_states_kernel<__half, 64>(const LinearStatesParams&, cudaStream_t);
}  // namespace dllm::cuda::sm90
