#include "cuda/commit/kernel.cuh"
#include "cuda/launch_kernel.h"

namespace dllm::cuda {
namespace {

template <class Real, class Id>
cudaError_t launch(const CommitParams& p, cudaStream_t stream) {
  return launch_kernel(commit_kernel<Real, Id>, p.batch, kCommitThreads,
                       commit_shared_bytes(p.candidates, p.float64), stream, p);
}

}  // namespace

cudaError_t commit(const CommitParams& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  if (p.float64)
    return p.canvas_is_int64 ? launch<double, int64_t>(p, stream) : launch<double, int32_t>(p, stream);
  return p.canvas_is_int64 ? launch<float, int64_t>(p, stream) : launch<float, int32_t>(p, stream);
}

}  // namespace dllm::cuda
