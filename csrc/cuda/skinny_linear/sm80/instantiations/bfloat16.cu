#include "cuda/skinny_linear/sm80/kernel.cuh"

namespace dllm::cuda::sm80 {
template cudaError_t launch_linear<__nv_bfloat16>(const SplitLinearParams&, cudaStream_t);
}  // namespace dllm::cuda::sm80
