// Rows of x divided by their scales and rounded to e4m3: a CTA for each row, which is read twice.
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"
#include "cuda/skinny_linear/launch.h"
#include "cuda/vectors.cuh"

namespace dllm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The largest of all threads' values, the same in all of them.
__device__ uint32_t largest_of_cta(uint32_t value, uint32_t (&shared)[kWarps]) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value = max(value, __shfl_xor_sync(~0u, value, other));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; warp++) value = max(value, shared[warp]);
  return value;
}

// Q: E4m3, or X, which holds every e4m3.
template <class X, class Q, int n>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const X* x, Q* out, float* scales, int32_t inputs) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  __shared__ uint32_t shared[kWarps];
  const int64_t row = blockIdx.x;
  x += row * inputs, out += row * inputs;
  uint32_t largest = 0;  // as bits, whose order is that of magnitudes, infinity and NaN
  for (int i = threadIdx.x * n; i < inputs; i += kThreads * n) {
    float v[n];
    load_values(v, x + i);
#pragma unroll
    for (int j = 0; j < n; j++) largest = max(largest, __float_as_uint(v[j]) & 0x7FFFFFFFu);
  }
  largest = largest_of_cta(largest, shared);
  const bool finite = largest < 0x7F800000u;
  const float scale = finite ? __uint_as_float(largest) / kLargestE4m3 : __uint_as_float(0x7FC00000u);
  if (threadIdx.x == 0) scales[row] = scale;
  for (int i = threadIdx.x * n; i < inputs; i += kThreads * n) {
    float v[n];
    load_values(v, x + i);
    Vector<n, Q> rounded;
#pragma unroll
    for (int j = 0; j < n; j++) {
      const E4m3 code = E4m3::nearest(finite && scale > 0 ? v[j] / scale : 0.0f);
      if constexpr (std::is_same_v<Q, E4m3>) rounded.values[j] = code;
      else rounded.values[j] = Q(code.value());
    }
    *reinterpret_cast<Vector<n, Q>*>(out + i) = rounded;
  }
}

}  // namespace

cudaError_t launch_quantize_rows(const SkinnyLinearParams& p, void* out, bool as_bytes, float* scales,
                                 cudaStream_t stream) {
  return with_type(p.x_type, [&](auto type) {
    using X = decltype(type);
    const auto launch = [&](auto kernel, auto* to) {
      return launch_overlapping_ctas(kernel, p.rows, kThreads, 0, stream, static_cast<const X*>(p.x), to,
                                     scales, p.inputs);
    };
    return with_vectors<X>(in_vectors<X>(p.inputs) && in_vectors<X>(p.x), [&](auto n) {
      return as_bytes ? launch(quantize_rows_kernel<X, E4m3, n>, static_cast<E4m3*>(out))
                      : launch(quantize_rows_kernel<X, X, n>, static_cast<X*>(out));
    });
  });
}

}  // namespace dllm::cuda
