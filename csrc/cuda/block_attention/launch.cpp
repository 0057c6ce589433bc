#include "cuda/block_attention/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dllm::cuda {

template <typename T>
cudaError_t launch_for_type(const BlockAttentionParams& p, cudaStream_t stream);  // instantiations/*.cu

cudaError_t launch_block_attention(const BlockAttentionParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::float32: return launch_for_type<float>(p, stream);
    case DType::bfloat16: return launch_for_type<__nv_bfloat16>(p, stream);
    case DType::float16: return launch_for_type<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dllm::cuda
