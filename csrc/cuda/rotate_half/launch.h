// rotate_half and its gradient on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace dllm::cuda {

cudaError_t launch_rotate_half(const RotateHalfParams& p, cudaStream_t stream);

}  // namespace dllm::cuda
