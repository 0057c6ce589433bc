// Launch of the token_divergence kernel: KL(p ‖ q) of the softmax distributions of two rows of logits.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace dllm::cuda {

cudaError_t token_divergence(const TokenDivergenceParams<ListedTokenIds>& params, cudaStream_t stream);

}  // namespace dllm::cuda
