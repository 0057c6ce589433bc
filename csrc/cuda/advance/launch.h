// Launch of the advance_ kernel: one CTA moves one row (core/advance.h).
#pragma once

#include <cuda_runtime_api.h>

#include "core/advance.h"

namespace dllm::cuda {

cudaError_t launch_advance(const AdvanceParams& p, cudaStream_t stream);

}  // namespace dllm::cuda
