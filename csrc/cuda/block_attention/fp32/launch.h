// block_attention in float32 on the CUDA cores: one kernel for each padded head dim (instantiations/).
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "cuda/block_attention/launch.h"

namespace dllm::cuda::fp32 {

template <int kDim>
cudaError_t launch_forward(const BlockAttentionParams& p, cudaStream_t stream);

// To follow the launches of query bounds and backward preprocess.
template <int kDim>
cudaError_t launch_backward(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                            cudaStream_t stream);

}  // namespace dllm::cuda::fp32
