// rms_norm, add_rms_norm and their gradient on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace dllm::cuda {

cudaError_t launch_rms_norm(const RmsNormParams& p, cudaStream_t stream);
// The gradient of x; with `scales`, a workspace [rows], also what that of weight needs.
cudaError_t launch_rms_norm_backward(const RmsNormBackwardParams& p, float* scales, cudaStream_t stream);
// The gradient of weight.
cudaError_t launch_rms_norm_weight_gradient(const RmsNormBackwardParams& p, const float* scales,
                                            cudaStream_t stream);

}  // namespace dllm::cuda
