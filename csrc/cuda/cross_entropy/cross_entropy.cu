#include <type_traits>

#include "cuda/cross_entropy/kernel.cuh"
#include "cuda/launch_kernel.h"

namespace dllm::cuda {
namespace {

// launch(kernel arguments' type T, its arithmetic Real)
template <class Launch>
cudaError_t with_types(DType type, const Launch& launch) {
  switch (type) {
    case DType::float32: return launch(float(), float());
    case DType::bfloat16: return launch(__nv_bfloat16(), float());
    case DType::float16: return launch(__half(), float());
    case DType::float64: return launch(double(), double());
  }
  return cudaErrorInvalidValue;
}

template <class Real>
cudaError_t add_up(const CrossEntropyParams<ListedTokenIds>& p, cudaStream_t stream) {
  return launch_kernel(weighted_sum_kernel<Real>, 1, kSumThreads, 0, stream, p);
}

cudaError_t shared_limit(int& bytes) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

}  // namespace

cudaError_t cross_entropy(const CrossEntropyParams<ListedTokenIds>& p, cudaStream_t stream) {
  return with_types(p.logits.type, [&](auto t, auto real) {
    using T = decltype(t);
    using Real = decltype(real);
    cudaError_t status = cudaSuccess;
    if (p.rows) status = launch_kernel(cross_entropy_kernel<T, Real>, p.rows, kRowThreads, 0, stream, p);
    return status == cudaSuccess ? add_up<Real>(p, stream) : status;
  });
}

cudaError_t cross_entropy_backward(const CrossEntropyParams<ListedTokenIds>& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return with_types(p.logits.type, [&](auto t, auto real) {
    const auto kernel = cross_entropy_backward_kernel<decltype(t), decltype(real)>;
    return launch_kernel(kernel, p.rows, kRowThreads, 0, stream, p);
  });
}

cudaError_t cross_entropy_in_place(const CrossEntropyParams<ListedTokenIds>& p, cudaStream_t stream) {
  int limit = 0;
  cudaError_t status = shared_limit(limit);
  if (status != cudaSuccess) return status;
  return with_types(p.logits.type, [&](auto t, auto real) {
    using T = decltype(t);
    using Real = decltype(real);
    if constexpr (std::is_same_v<T, __half>) {
      return cudaErrorInvalidValue;  // too small for gradients
    } else {
      const int64_t bytes = resident_bytes(p.vocabulary * sizeof(T), limit);
      const auto resident = static_cast<int32_t>(bytes / 16);
      if (p.rows)
        status = launch_kernel(cross_entropy_in_place_kernel<T, Real>, p.rows, kRowThreads, bytes, stream, p,
                               resident);
      return status == cudaSuccess ? add_up<Real>(p, stream) : status;
    }
  });
}

}  // namespace dllm::cuda
