#include "cuda/launch_kernel.h"
#include "cuda/token_divergence/kernel.cuh"

namespace dllm::cuda {
namespace {

template <class T>
cudaError_t launch(const TokenDivergenceParams<ListedTokenIds>& p, cudaStream_t stream) {
  const auto kernel = p.float64 ? token_divergence_kernel<T, double> : token_divergence_kernel<T, float>;
  return launch_kernel(kernel, p.rows, kDivergenceThreads, 0, stream, p);
}

}  // namespace

cudaError_t token_divergence(const TokenDivergenceParams<ListedTokenIds>& p, cudaStream_t stream) {
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
