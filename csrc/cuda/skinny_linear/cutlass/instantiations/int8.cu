#include "cuda/skinny_linear/cutlass/gemm.cuh"

namespace dllm::cuda::cutlass_gemm {

template size_t workspace_of<__nv_bfloat16, false>(const SkinnyLinearParams&);
template size_t workspace_of<__half, false>(const SkinnyLinearParams&);
template cudaError_t launch_gemm<__nv_bfloat16, false>(const SkinnyLinearParams&, void*, cudaStream_t);
template cudaError_t launch_gemm<__half, false>(const SkinnyLinearParams&, void*, cudaStream_t);

}  // namespace dllm::cuda::cutlass_gemm
