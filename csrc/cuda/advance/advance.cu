#include "cuda/advance/kernel.cuh"
#include "cuda/launch_kernel.h"

namespace dllm::cuda {

cudaError_t launch_advance(const AdvanceParams& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  const auto kernel = p.canvas_is_int64 ? advance_kernel<int64_t> : advance_kernel<int32_t>;
  return launch_kernel(kernel, static_cast<unsigned>(p.batch), kAdvanceThreads, 0, stream, p);
}

}  // namespace dllm::cuda
