#include "cuda/skinny_linear/sm90/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dllm::cuda::sm90 {
namespace {

template <class T, bool kBytes>
cudaError_t launch_rows(const StreamedLinearParams& p, int rows, cudaStream_t stream) {
  switch (rows) {
    case 8: return launch_linear_kernel<T, 8, kBytes>(p, stream);
    case 16: return launch_linear_kernel<T, 16, kBytes>(p, stream);
    case 32: return launch_linear_kernel<T, 32, kBytes>(p, stream);
    default: return launch_linear_kernel<T, kMaxStreamRows, kBytes>(p, stream);
  }
}

template <class T>
cudaError_t launch_weight(const StreamedLinearParams& p, int rows, cudaStream_t stream) {
  return p.split.linear.scales ? launch_rows<T, true>(p, rows, stream)
                               : launch_rows<T, false>(p, rows, stream);
}

}  // namespace

cudaError_t launch_linear(const SplitLinearParams& split, cudaStream_t stream) {
  const SkinnyLinearParams& p = split.linear;
  StreamedLinearParams params{split, {}, {}};
  const int rows = stream_rows(p.rows);
  cudaError_t status = encode_panel_map(params.x, p.x_type, p.x, p.rows, p.inputs, p.inputs, rows);
  const int together = p.scales ? 2 : 1;  // elements of the weight in one of its map
  if (status == cudaSuccess)
    status = encode_panel_map(params.weight, p.x_type, p.weight, p.outputs, p.inputs / together,
                              p.weight_stride / together, StreamedLinearTiles<8, false>::kUnit);
  if (status != cudaSuccess) return status;
  return p.x_type == DType::bfloat16 ? launch_weight<__nv_bfloat16>(params, rows, stream)
                                     : launch_weight<__half>(params, rows, stream);
}

}  // namespace dllm::cuda::sm90
