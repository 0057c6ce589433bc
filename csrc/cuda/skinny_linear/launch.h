// skinny_linear on CUDA: x · weightᵀ + bias, the weight read once for up to 64 rows of x.
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

// With a weight in e4m3, x is divided by a scale for each of its rows and rounded to e4m3 first.
// The workspace of a problem, at a multiple of 256 bytes: bytes.
int64_t skinny_linear_workspace(const SkinnyLinearParams& p);
cudaError_t launch_skinny_linear(const SkinnyLinearParams& p, void* workspace, cudaStream_t stream);

// x in e4m3 to `out`, as bytes or in the type of x, and its scales [rows]; quantize_rows.cu.
cudaError_t launch_quantize_rows(const SkinnyLinearParams& p, void* out, bool as_bytes, float* scales,
                                 cudaStream_t stream);
cudaError_t launch_linear_of_any_types(const SkinnyLinearParams& p, cudaStream_t stream);  // any_types.cu
cudaError_t launch_linear_merge(const SplitLinearParams& p, cudaStream_t stream);          // merge.cu

}  // namespace dllm::cuda
