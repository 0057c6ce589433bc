#include <algorithm>

#include "cuda/launch_kernel.h"
#include "cuda/token_stats/kernel.cuh"

namespace dllm::cuda {
namespace {

template <class T, class Real>
cudaError_t launch(const TokenStatsParams& p, cudaStream_t stream) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t rows_y = std::min(p.rows, kMaxGridY);
  const dim3 grid(stats_ranges(p.vocabulary), rows_y, (p.rows + rows_y - 1) / rows_y);
  const bool plain = p.temperature == 0 && p.confidence_scale == 1 && p.proposal_exclude.count == 0 &&
                     p.confidence_exclude.count == 0;
  constexpr bool kHasPlain = sizeof(Real) == 4;  // float64 is for parity, not for speed
  const auto states_kernel =
      plain && kHasPlain ? token_states_kernel<T, Real, kHasPlain> : token_states_kernel<T, Real, false>;
  const cudaError_t status = launch_kernel(states_kernel, grid, kStatsThreads, 0, stream, p);
  if (status != cudaSuccess) return status;
  const int64_t ctas = (p.rows + kStatsWarps - 1) / kStatsWarps;
  return launch_kernel(token_results_kernel<T, Real>, ctas, kStatsThreads, 0, stream, p);
}

template <class T>
cudaError_t launch(const TokenStatsParams& p, cudaStream_t stream) {
  return p.float64 ? launch<T, double>(p, stream) : launch<T, float>(p, stream);
}

}  // namespace

size_t token_stats_workspace(int64_t rows, int32_t vocabulary, bool float64) {
  return rows * stats_ranges(vocabulary) * (float64 ? sizeof(TokenState<double>) : sizeof(TokenState<float>));
}

cudaError_t token_stats(const TokenStatsParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  switch (p.type) {
    case LogitType::float32: return launch<float>(p, stream);
    case LogitType::bfloat16: return launch<__nv_bfloat16>(p, stream);
    case LogitType::float16: return launch<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dllm::cuda
