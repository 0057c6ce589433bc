#include "cuda/skinny_linear/cutlass/gemm.cuh"

namespace dllm::cuda::cutlass_gemm {

template size_t workspace_of<__nv_bfloat16, true>(const SkinnyLinearParams&);
template cudaError_t launch_gemm<__nv_bfloat16, true>(const SkinnyLinearParams&, void*, cudaStream_t);

}  // namespace dllm::cuda::cutlass_gemm
