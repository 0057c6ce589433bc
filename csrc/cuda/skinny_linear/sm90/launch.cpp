#include "cuda/skinny_linear/sm90/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dllm::cuda::sm90 {
namespace {

template <class T>
cudaError_t launch_rows(const StreamedLinearParams& p, int rows, cudaStream_t stream) {
  switch (rows) {
    case 8: return launch_linear_kernel<T, 8>(p, stream);
    case 16: return launch_linear_kernel<T, 16>(p, stream);
    case 32: return launch_linear_kernel<T, 32>(p, stream);
    default: return launch_linear_kernel<T, kMaxStreamRows>(p, stream);
  }
}

}  // namespace

cudaError_t launch_linear(const SplitLinearParams& split, cudaStream_t stream) {
  const SkinnyLinearParams& p = split.linear;
  StreamedLinearParams params{split, {}, {}};
  const int rows = stream_rows(p.rows);
  cudaError_t status = encode_panel_map(params.x, p.x_type, p.x, p.rows, p.inputs, p.inputs, rows);
  if (status == cudaSuccess)
    status = encode_panel_map(params.weight, p.weight_type, p.weight, p.outputs, p.inputs, p.weight_stride,
                              StreamedLinearTiles<8>::kUnit);
  if (status != cudaSuccess) return status;
  return p.x_type == DType::bfloat16 ? launch_rows<__nv_bfloat16>(params, rows, stream)
                                     : launch_rows<__half>(params, rows, stream);
}

}  // namespace dllm::cuda::sm90
