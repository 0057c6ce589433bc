// Launch of the commit kernel: acceptance by a rule of core/acceptance.h, proposals written in place.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "cuda/commit/config.h"

namespace dllm::cuda {

cudaError_t commit(const CommitParams& params, cudaStream_t stream);

}  // namespace dllm::cuda
