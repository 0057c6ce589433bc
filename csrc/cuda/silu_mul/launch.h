// silu_mul and its gradient on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace dllm::cuda {

// The gradient where there is p.grad.
cudaError_t launch_silu_mul(const SiluMulParams& p, cudaStream_t stream);

}  // namespace dllm::cuda
