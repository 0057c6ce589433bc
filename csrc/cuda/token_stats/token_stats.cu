#include <algorithm>

#include "cuda/launch_kernel.h"
#include "cuda/token_stats/greedy_states.cuh"
#include "cuda/token_stats/kernel.cuh"
#include "cuda/token_stats/token_filter.cuh"

namespace dllm::cuda {
namespace {

dim3 grid_of_rows(int ctas, int64_t rows) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t rows_y = std::min(rows, kMaxGridY);
  return dim3(ctas, rows_y, (rows + rows_y - 1) / rows_y);
}

template <class T, class Real>
cudaError_t fill_states(const RowStatsParams& p, cudaStream_t stream) {
  const dim3 grid = grid_of_rows(stats_ranges(p.vocabulary), p.rows);
  if constexpr (sizeof(Real) == 4) {  // float64 is for parity, not for speed
    const bool greedy = p.temperature == 0 && p.confidence_scale == 1 && p.proposal_exclude.count == 0 &&
                        p.confidence_exclude.count == 0 && !p.cuts;
    if (greedy) return launch_kernel(greedy_token_states_kernel<T>, grid, kStatsThreads, 0, stream, p);
  }
  return launch_kernel(token_states_kernel<T, Real>, grid, kStatsThreads, 0, stream, p);
}

// The filters look at what the confidence is made of, before anything is left out of it.
template <class T, class Real>
cudaError_t find_filters(RowStatsParams p, cudaStream_t stream) {
  RowStatsParams unfiltered = p;
  unfiltered.temperature = 0;
  unfiltered.confidence_exclude.count = 0;
  unfiltered.cuts = nullptr;
  const cudaError_t status = fill_states<T, Real>(unfiltered, stream);
  if (status != cudaSuccess) return status;
  return launch_kernel(token_filter_kernel<T, Real>, grid_of_rows(1, p.rows), kFilterThreads, 0, stream, p);
}

template <class T, class Real>
cudaError_t launch(const RowStatsParams& p, cudaStream_t stream) {
  cudaError_t status = p.cuts ? find_filters<T, Real>(p, stream) : cudaSuccess;
  if (status == cudaSuccess) status = fill_states<T, Real>(p, stream);
  if (status != cudaSuccess) return status;
  const int64_t ctas = (p.rows + kStatsWarps - 1) / kStatsWarps;
  return launch_kernel(token_results_kernel<T, Real>, ctas, kStatsThreads, 0, stream, p);
}

template <class T>
cudaError_t launch(const RowStatsParams& p, cudaStream_t stream) {
  return p.float64 ? launch<T, double>(p, stream) : launch<T, float>(p, stream);
}

}  // namespace

size_t token_stats_workspace(int64_t rows, int32_t vocabulary, bool float64) {
  return rows * stats_ranges(vocabulary) * (float64 ? sizeof(TokenState<double>) : sizeof(TokenState<float>));
}

cudaError_t token_stats(const RowStatsParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  switch (p.logits.type) {
    case DType::float32: return launch<float>(p, stream);
    case DType::bfloat16: return launch<__nv_bfloat16>(p, stream);
    case DType::float16: return launch<__half>(p, stream);
    case DType::float64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace dllm::cuda
