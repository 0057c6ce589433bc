// Sums of splits into results: a thread for each, in the order of the splits.
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"
#include "cuda/skinny_linear/epilogue.cuh"

namespace dllm::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) linear_merge_kernel(const SplitLinearParams p) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int64_t results = p.linear.rows * p.linear.outputs;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= results) return;
  float sum = p.partial[at];
#pragma unroll 4
  for (int split = 1; split < p.splits.splits; split++) sum += p.partial[split * results + at];
  store_result<T>(p.linear, at / p.linear.outputs, static_cast<int32_t>(at % p.linear.outputs), sum);
}

}  // namespace

cudaError_t launch_linear_merge(const SplitLinearParams& p, cudaStream_t stream) {
  const int64_t ctas = (p.linear.rows * p.linear.outputs - 1) / kThreads + 1;
  const auto kernel =
      p.linear.x_type == DType::bfloat16 ? linear_merge_kernel<__nv_bfloat16> : linear_merge_kernel<__half>;
  return launch_overlapping_ctas(kernel, ctas, kThreads, 0, stream, p);
}

}  // namespace dllm::cuda
