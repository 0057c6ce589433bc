// block_attention on tensor cores by mma.sync: one kernel for each 16-bit type and padded head dim
// (instantiations/).
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "cuda/block_attention/launch.h"

namespace dllm::cuda::sm80 {

template <class T, int kDim>
cudaError_t launch_forward(const BlockAttentionParams& p, cudaStream_t stream);

// To follow the launches of query bounds and backward preprocess.
template <class T, int kDim>
cudaError_t launch_backward_dkv(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                                cudaStream_t stream);
template <class T, int kDim>
cudaError_t launch_backward_dq(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                               cudaStream_t stream);

}  // namespace dllm::cuda::sm80
