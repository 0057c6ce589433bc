#include "cuda/linear_token_stats/launch.h"

#include "core/token_state.h"
#include "cuda/launch_kernel.h"
#ifdef DLLM_CUDA_HAS_SM90A
#include "cuda/linear_token_stats/sm90/dispatch.h"
#include "cuda/linear_token_stats/sm90/launch.h"
#endif

namespace dllm::cuda {

bool serves_linear_token_stats([[maybe_unused]] const LinearTokenStatsParams& p) {
#ifdef DLLM_CUDA_HAS_SM90A
  return sm90::serves(p.projection, p.stats.float64, compute_capability());
#else
  return false;
#endif
}

size_t linear_token_states_workspace(int64_t rows, int32_t vocabulary) {
  return rows * VocabularyRanges(vocabulary).count * sizeof(TokenState<float>);
}

cudaError_t launch_linear_token_stats([[maybe_unused]] const LinearTokenStatsParams& p,
                                      [[maybe_unused]] cudaStream_t stream) {
#ifdef DLLM_CUDA_HAS_SM90A
  if (p.stats.rows == 0) return cudaSuccess;
  const cudaError_t status = sm90::launch_linear_token_states(p, stream);
  return status == cudaSuccess ? launch_linear_token_results(p, stream) : status;
#else
  return cudaErrorNotSupported;
#endif
}

}  // namespace dllm::cuda
