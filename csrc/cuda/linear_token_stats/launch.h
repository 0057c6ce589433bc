// linear_token_stats where one kernel multiplies and takes the statistics: the weight is streamed once for up
// to 64 rows, and logits stay on chip.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/linear_token_stats/config.h"
#include "cuda/token_stats/launch.h"

namespace dllm::cuda {

struct LinearTokenStatsParams {
  RowStatsParams stats;  // without logits; states: workspace [rows, ranges] of TokenState<float>
  float* proposals;      // workspace [rows, ranges]: the logit of each state's token
  Projection projection;
};

// Whether there are kernels for this problem on the current device.
bool serves_linear_token_stats(const LinearTokenStatsParams& p);

size_t linear_token_states_workspace(int64_t rows, int32_t vocabulary);  // bytes
cudaError_t launch_linear_token_stats(const LinearTokenStatsParams& p, cudaStream_t stream);

cudaError_t launch_linear_token_results(const LinearTokenStatsParams& p, cudaStream_t stream);  // results.cu

}  // namespace dllm::cuda
