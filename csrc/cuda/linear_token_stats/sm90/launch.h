// Hopper kernel of linear_token_stats: TMA, wgmma, a warp that fetches; 16-bit types.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/linear_token_stats/launch.h"
#include "cuda/linear_token_stats/sm90/config.h"
#include "cuda/sm90/tensor_map.h"

namespace dllm::cuda::sm90 {

struct LinearStatesParams {
  LinearTokenStatsParams linear;
  TensorMap hidden, weight;  // [rows, hidden_size] and [vocabulary, hidden_size], boxes of one panel
};

// Fills states and proposals.
cudaError_t launch_linear_token_states(const LinearTokenStatsParams& p, cudaStream_t stream);

template <class T, int kRows>
cudaError_t launch_linear_states_kernel(const LinearStatesParams& p, cudaStream_t stream);  // instantiations

}  // namespace dllm::cuda::sm90
