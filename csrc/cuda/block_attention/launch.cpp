#include "cuda/block_attention/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/attention/padded_dim.h"

namespace dllm::cuda {

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
