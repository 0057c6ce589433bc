#include "cuda/skinny_linear/cutlass/gemm.cuh"

namespace dllm::cuda::cutlass_gemm {

template size_t workspace_of<__half, true>(const SkinnyLinearParams&);
template cudaError_t launch_gemm<__half, true>(const SkinnyLinearParams&, void*, cudaStream_t);

}  // namespace dllm::cuda::cutlass_gemm
