// skinny_linear on CUDA: x · weightᵀ + bias for few rows of x, the weight read once for up to 64 rows.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "cuda/skinny_linear/config.h"

namespace dllm::cuda {

struct SplitLinearParams {
  SkinnyLinearParams linear;
  LinearSplits splits;
  float* partial;  // workspace [splits, rows, outputs] where there are several splits, else null
};

// The workspace of a problem: floats.
int64_t skinny_linear_workspace(const SkinnyLinearParams& p);
cudaError_t launch_skinny_linear(const SkinnyLinearParams& p, float* workspace, cudaStream_t stream);

cudaError_t launch_linear_of_any_types(const SkinnyLinearParams& p, cudaStream_t stream);  // any_types.cu
cudaError_t launch_linear_merge(const SplitLinearParams& p, cudaStream_t stream);          // merge.cu

}  // namespace dllm::cuda
