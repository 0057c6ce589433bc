#include "cuda/linear_token_stats/sm90/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dllm::cuda::sm90 {
namespace {

cudaError_t map_rows(TensorMap& map, DType dtype, const void* data, int64_t rows, int64_t columns,
                     int64_t stride, int box_rows) {
  const TensorShape<2> shape{{static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
                             {static_cast<uint64_t>(2 * stride)},
                             {kPanelColumns, static_cast<uint32_t>(box_rows)}};
  return encode_tensor_map(map, dtype, data, shape);
}

template <class T>
cudaError_t launch_rows(const LinearStatesParams& p, int rows, cudaStream_t stream) {
  switch (rows) {
    case 8: return launch_linear_states_kernel<T, 8>(p, stream);
    case 16: return launch_linear_states_kernel<T, 16>(p, stream);
    case 32: return launch_linear_states_kernel<T, 32>(p, stream);
    default: return launch_linear_states_kernel<T, kMaxLinearRows>(p, stream);
  }
}

}  // namespace

cudaError_t launch_linear_token_states(const LinearTokenStatsParams& linear, cudaStream_t stream) {
  const Projection& p = linear.projection;
  LinearStatesParams params{linear, {}, {}};
  const int rows = linear_rows(linear.stats.rows);
  cudaError_t status =
      map_rows(params.hidden, p.hidden_type, p.hidden, linear.stats.rows, p.hidden_size, p.hidden_size, rows);
  if (status == cudaSuccess)
    status = map_rows(params.weight, p.weight_type, p.weight, linear.stats.vocabulary, p.hidden_size,
                      p.weight_stride, VocabularyRanges::kUnit);
  if (status != cudaSuccess) return status;
  return p.weight_type == DType::bfloat16 ? launch_rows<__nv_bfloat16>(params, rows, stream)
                                          : launch_rows<__half>(params, rows, stream);
}

}  // namespace dllm::cuda::sm90
