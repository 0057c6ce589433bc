// From the states of a row's ranges to its statistics, a warp per row.
#include "cuda/launch_kernel.h"
#include "cuda/linear_token_stats/launch.h"
#include "cuda/token_stats/row_state.cuh"

namespace dllm::cuda {
namespace {

__global__ void __launch_bounds__(kStatsThreads)
    linear_token_results_kernel(const __grid_constant__ LinearTokenStatsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kStatsWarps + threadIdx.x / 32;
  if (row >= p.stats.rows) return;
  const VocabularyRanges ranges(p.stats.vocabulary);
  const auto* states = static_cast<const TokenState<float>*>(p.stats.states);
  const TokenState<float> state = merged_ranges(states + row * ranges.count, ranges.count);
  if (threadIdx.x % 32 > 0) return;
  float x = -HUGE_VALF;
  if (state.token >= 0 && !listed(p.stats.confidence_exclude, state.token))
    x = tame(p.proposals[row * ranges.count + state.token / ranges.ids] * p.stats.confidence_scale);
  write_result(p.stats, row, finish(state, x, p.stats.fallback, p.stats.vocabulary));
}

}  // namespace

cudaError_t launch_linear_token_results(const LinearTokenStatsParams& p, cudaStream_t stream) {
  const int64_t ctas = (p.stats.rows + kStatsWarps - 1) / kStatsWarps;
  return launch_ctas(linear_token_results_kernel, ctas, kStatsThreads, 0, stream, p);
}

}  // namespace dllm::cuda
