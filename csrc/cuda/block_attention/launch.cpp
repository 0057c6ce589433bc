#include "cuda/block_attention/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace dllm::cuda {
namespace {

// launch(kDim) with the smallest padded head dim that holds `dim`, as a constant.
template <class Launch>
cudaError_t with_padded_dim(int dim, const Launch& launch) {
  if (dim <= 64) return launch(std::integral_constant<int, 64>());
  if (dim <= 128) return launch(std::integral_constant<int, 128>());
  return launch(std::integral_constant<int, 256>());
}

}  // namespace

cudaError_t launch_block_attention(const BlockAttentionParams& p, cudaStream_t stream) {
  return with_padded_dim(p.head_dim, [&](auto dim) {
    switch (p.dtype) {
      case DType::bfloat16: return launch_forward<__nv_bfloat16, dim>(p, stream);
      case DType::float16: return launch_forward<__half, dim>(p, stream);
      case DType::float32: return launch_plain_forward<dim>(p, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace dllm::cuda
