// Launches of the cross entropy kernels: rows of logits against target ids. Rows of weight 0 are not read.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace dllm::cuda {

// Writes ce, logsumexp and loss.
cudaError_t cross_entropy(const CrossEntropyParams<ListedTokenIds>& params, cudaStream_t stream);
// Reads logsumexp and grad_loss, writes grad.
cudaError_t cross_entropy_backward(const CrossEntropyParams<ListedTokenIds>& params, cudaStream_t stream);
// Writes ce and loss, and over the logits the gradient of loss.
cudaError_t cross_entropy_in_place(const CrossEntropyParams<ListedTokenIds>& params, cudaStream_t stream);

}  // namespace dllm::cuda
