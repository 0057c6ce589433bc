// x · weightᵀ + bias of any types and alignments on CUDA cores: a warp for each output and kRows rows of x, a
// lane for every 32nd input.
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"
#include "cuda/skinny_linear/epilogue.cuh"

namespace dllm::cuda {
namespace {

constexpr int kWarps = 4, kRows = 8;

template <class X, class W>
__global__ void __launch_bounds__(32 * kWarps) linear_of_any_types_kernel(const SkinnyLinearParams p) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int lane = threadIdx.x % 32;
  const int64_t passes = (p.rows - 1) / kRows + 1;  // over the rows: those of an output run side by side
  const int64_t first = blockIdx.x % passes * kRows;
  const int64_t output = blockIdx.x / passes * kWarps + threadIdx.x / 32;
  if (output >= p.outputs) return;
  const W* weight = static_cast<const W*>(p.weight) + output * p.weight_stride;
  const X* x[kRows];
#pragma unroll
  for (int i = 0; i < kRows; i++) x[i] = static_cast<const X*>(p.x) + min(first + i, p.rows - 1) * p.inputs;

  float sums[kRows] = {};
  const int32_t size = p.inputs / p.groups;
  for (int32_t group = 0; group < p.groups; group++) {
    float of_group[kRows] = {};
#pragma unroll 4
    for (int32_t k = group * size + lane; k < (group + 1) * size; k += 32) {
      const float w = widen(weight[k]);
#pragma unroll
      for (int i = 0; i < kRows; i++) of_group[i] = fmaf(widen(x[i][k]), w, of_group[i]);
    }
    const float scale = p.scales ? p.scales[output * p.groups + group] : 1.0f;
#pragma unroll
    for (int i = 0; i < kRows; i++) sums[i] = fmaf(scale, of_group[i], sums[i]);
  }
#pragma unroll
  for (int i = 0; i < kRows; i++) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], other);
    if (lane == i && first + i < p.rows) store_result<X>(p, first + i, static_cast<int32_t>(output), sums[i]);
  }
}

template <class X>
auto kernel_of(const SkinnyLinearParams& p) {
  if (p.scales) return p.e4m3 ? linear_of_any_types_kernel<X, E4m3> : linear_of_any_types_kernel<X, int8_t>;
  switch (p.weight_type) {
    case DType::bfloat16: return linear_of_any_types_kernel<X, __nv_bfloat16>;
    case DType::float16: return linear_of_any_types_kernel<X, __half>;
    default: return linear_of_any_types_kernel<X, float>;
  }
}

}  // namespace

cudaError_t launch_linear_of_any_types(const SkinnyLinearParams& p, cudaStream_t stream) {
  const auto kernel = p.x_type == DType::bfloat16  ? kernel_of<__nv_bfloat16>(p)
                      : p.x_type == DType::float16 ? kernel_of<__half>(p)
                                                   : kernel_of<float>(p);
  const int64_t passes = (p.rows - 1) / kRows + 1, ctas = ((p.outputs - 1) / kWarps + 1) * passes;
  return launch_overlapping_ctas(kernel, ctas, 32 * kWarps, 0, stream, p);
}

}  // namespace dllm::cuda
