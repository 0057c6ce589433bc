// A thread for a vector of the first half of a head and the one in its place in the second half; those of
// query and key of a position run side by side.
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"
#include "cuda/rotate_half/launch.h"
#include "cuda/rotate_half/rotated.cuh"
#include "cuda/tiles/head_pointer.cuh"

namespace dllm::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, int n>
__global__ void __launch_bounds__(kThreads) rotate_half_kernel(const __grid_constant__ RotateHalfParams p) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int half = p.head_dim / 2, heads = p.q_heads + p.kv_heads;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int i = static_cast<int>(index % (half / n)) * n;
  index /= half / n;
  int head = static_cast<int>(index % heads);
  index /= heads;
  const int64_t position = index % p.length, batch = index / p.length;
  if (batch >= p.batch) return;
  const bool of_key = head >= p.q_heads;
  if (of_key) head -= p.q_heads;
  const HeadsLayout &layout = of_key ? p.key_layout : p.query_layout,
                    &out_layout = of_key ? p.key_out_layout : p.query_out_layout;
  const T* from =
      head_pointer<T>(of_key ? p.key : p.query, layout, batch, head) + position * layout.position_stride + i;
  T* to = head_pointer<T>(of_key ? p.key_out : p.query_out, out_layout, batch, head) +
          position * out_layout.position_stride + i;
  const T* cos =
      static_cast<const T*>(p.cos) + batch * p.cos_batch_stride + position * p.cos_position_stride + i;
  const T* sin =
      static_cast<const T*>(p.sin) + batch * p.sin_batch_stride + position * p.sin_position_stride + i;

  float a[n], b[n], cos_a[n], cos_b[n], sin_a[n], sin_b[n];
  load_values(a, from);
  load_values(b, from + half);
  load_values(cos_a, cos);
  load_values(cos_b, cos + half);
  load_values(sin_a, sin);
  load_values(sin_b, sin + half);
#pragma unroll
  for (int j = 0; j < n; j++) {
    const float x = a[j], y = b[j];
    if (p.transposed) {
      a[j] = x * cos_a[j] + y * sin_b[j];
      b[j] = y * cos_b[j] - x * sin_a[j];
    } else {
      a[j] = rotated<T>(x, -y, cos_a[j], sin_a[j]);
      b[j] = rotated<T>(y, x, cos_b[j], sin_b[j]);
    }
  }
  store_values(to, a);
  store_values(to + half, b);
}

}  // namespace

cudaError_t launch_rotate_half(const RotateHalfParams& p, cudaStream_t stream) {
  const int64_t half = p.head_dim / 2, heads = p.q_heads + p.kv_heads;
  const int64_t pairs = half * heads * p.length * p.batch;
  if (pairs == 0) return cudaSuccess;
  return with_type(p.dtype, [&]<class T>(T) {
    const bool vectors =
        in_vectors<T>(half) && in_vectors<T>(p.query, p.query_layout) && in_vectors<T>(p.key, p.key_layout) &&
        in_vectors<T>(p.query_out, p.query_out_layout) && in_vectors<T>(p.key_out, p.key_out_layout) &&
        in_vectors<T>(p.cos) && in_vectors<T>(p.sin) && in_vectors<T>(p.cos_batch_stride) &&
        in_vectors<T>(p.sin_batch_stride) && in_vectors<T>(p.cos_position_stride) &&
        in_vectors<T>(p.sin_position_stride);
    return with_vectors<T>(vectors, [&](auto n) {
      const int64_t ctas = (pairs / n - 1) / kThreads + 1;
      return launch_overlapping_ctas(rotate_half_kernel<T, n>, ctas, kThreads, 0, stream, p);
    });
  });
}

}  // namespace dllm::cuda
