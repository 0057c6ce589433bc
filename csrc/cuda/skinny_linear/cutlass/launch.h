// skinny_linear for Hopper by CUTLASS: x and the weight in e4m3, or more than a few rows of x with a weight
// in int8.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>

#include "core/params.h"

namespace dllm::cuda::cutlass_gemm {

// The workspace of a problem, in bytes; addresses are not read.
size_t linear_workspace(const SkinnyLinearParams& p);
// Throws std::runtime_error with the problem and CUTLASS's status where CUTLASS fails.
cudaError_t launch_linear(const SkinnyLinearParams& p, void* workspace, cudaStream_t stream);

// Of results in T, __nv_bfloat16 or __half; instantiations.
template <class T, bool kE4m3>
size_t workspace_of(const SkinnyLinearParams& p);
template <class T, bool kE4m3>
cudaError_t launch_gemm(const SkinnyLinearParams& p, void* workspace, cudaStream_t stream);

}  // namespace dllm::cuda::cutlass_gemm
