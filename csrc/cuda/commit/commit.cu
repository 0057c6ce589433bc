#include "cuda/commit/kernel.cuh"

namespace dllm::cuda {
namespace {

template <class Real, class Id>
cudaError_t launch(const CommitParams& p, cudaStream_t stream) {
  const size_t shared = commit_shared_bytes(p.candidates, p.float64);
  if (shared > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(
        commit_kernel<Real, Id>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (status != cudaSuccess) return status;
  }
  commit_kernel<Real, Id><<<p.batch, kCommitThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t commit(const CommitParams& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  if (p.float64)
    return p.canvas_is_int64 ? launch<double, int64_t>(p, stream) : launch<double, int32_t>(p, stream);
  return p.canvas_is_int64 ? launch<float, int64_t>(p, stream) : launch<float, int32_t>(p, stream);
}

}  // namespace dllm::cuda
