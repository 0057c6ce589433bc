#include "cuda/linear_token_stats/sm90/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dllm::cuda::sm90 {
namespace {

template <class T>
cudaError_t launch_rows(const LinearStatesParams& p, int rows, cudaStream_t stream) {
  switch (rows) {
    case 8: return launch_linear_states_kernel<T, 8>(p, stream);
    case 16: return launch_linear_states_kernel<T, 16>(p, stream);
    case 32: return launch_linear_states_kernel<T, 32>(p, stream);
    default: return launch_linear_states_kernel<T, kMaxStreamRows>(p, stream);
  }
}

}  // namespace

cudaError_t launch_linear_token_states(const LinearTokenStatsParams& linear, cudaStream_t stream) {
  const Projection& p = linear.projection;
  LinearStatesParams params{linear, {}, {}};
  const int rows = stream_rows(linear.stats.rows);
  cudaError_t status = encode_panel_map(params.hidden, p.hidden_type, p.hidden, linear.stats.rows,
                                        p.hidden_size, p.hidden_size, rows);
  if (status == cudaSuccess)
    status = encode_panel_map(params.weight, p.weight_type, p.weight, linear.stats.vocabulary, p.hidden_size,
                              p.weight_stride, VocabularyRanges::kUnit);
  if (status != cudaSuccess) return status;
  return p.weight_type == DType::bfloat16 ? launch_rows<__nv_bfloat16>(params, rows, stream)
                                          : launch_rows<__half>(params, rows, stream);
}

}  // namespace dllm::cuda::sm90
