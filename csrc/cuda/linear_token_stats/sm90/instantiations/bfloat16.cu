#include "cuda/linear_token_stats/sm90/kernel.cuh"

namespace dllm::cuda::sm90 {
template cudaError_t launch_linear_states_kernel<__nv_bfloat16, 8>(const LinearStatesParams&, cudaStream_t);
template cudaError_t launch_linear_states_kernel<__nv_bfloat16, 16>(const LinearStatesParams&, cudaStream_t);
template cudaError_t launch_linear_states_kernel<__nv_bfloat16, 32>(const LinearStatesParams&, cudaStream_t);
template cudaError_t launch_linear_states_kernel<__nv_bfloat16, 64>(const LinearStatesParams&, cudaStream_t);
}  // namespace dllm::cuda::sm90
