#include "cuda/skinny_linear/cutlass/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dllm::cuda::cutlass_gemm {

size_t linear_workspace(const SkinnyLinearParams& p) {
  if (p.x_type == DType::bfloat16)
    return p.e4m3 ? workspace_of<__nv_bfloat16, true>(p) : workspace_of<__nv_bfloat16, false>(p);
  return p.e4m3 ? workspace_of<__half, true>(p) : workspace_of<__half, false>(p);
}

cudaError_t launch_linear(const SkinnyLinearParams& p, void* workspace, cudaStream_t stream) {
  if (p.x_type == DType::bfloat16)
    return p.e4m3 ? launch_gemm<__nv_bfloat16, true>(p, workspace, stream)
                  : launch_gemm<__nv_bfloat16, false>(p, workspace, stream);
  return p.e4m3 ? launch_gemm<__half, true>(p, workspace, stream)
                : launch_gemm<__half, false>(p, workspace, stream);
}

}  // namespace dllm::cuda::cutlass_gemm
