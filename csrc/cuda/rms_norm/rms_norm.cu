// A CTA for each row, which is read twice: for its mean square, and to be scaled. A thread reads in the
// second pass what it read or wrote in the first. Sums have the same order for any number of rows.
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"
#include "cuda/rms_norm/launch.h"
#include "cuda/vectors.cuh"

namespace dllm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Sums over the CTA, the same in all threads; `shared` is free again after the next barrier.
template <int n>
__device__ void sum_over_cta(float (&sums)[n], float (&shared)[n][kWarps]) {
#pragma unroll
  for (int i = 0; i < n; i++) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], other);
    if (threadIdx.x % 32 == 0) shared[i][threadIdx.x / 32] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; i++) {
    sums[i] = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) sums[i] += shared[i][warp];
  }
}

__device__ inline float inverse_root(float squares, int width, float eps) {
  return 1.0f / sqrtf(squares / width + eps);
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  __shared__ float shared[1][kWarps];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + p.x_layout.offset(row);
  const T* residual =
      p.residual ? static_cast<const T*>(p.residual) + p.residual_layout.offset(row) : nullptr;
  T* sum = static_cast<T*>(p.sum) + row * p.width;
  float squares[1] = {};
  for (int i = threadIdx.x * n; i < p.width; i += kThreads * n) {
    float v[n];
    load_values(v, x + i);
    if (residual) {
      float r[n];
      load_values(r, residual + i);
#pragma unroll
      for (int j = 0; j < n; j++) v[j] = rounded<T>(v[j] + r[j]);
      store_values(sum + i, v);
    }
#pragma unroll
    for (int j = 0; j < n; j++) squares[0] = fmaf(v[j], v[j], squares[0]);
  }
  sum_over_cta(squares, shared);
  const float scale = inverse_root(squares[0], p.width, p.eps);
  if (residual) x = sum;
  for (int i = threadIdx.x * n; i < p.width; i += kThreads * n) {
    float v[n], weight[n];
    load_values(v, x + i);
    load_values(weight, static_cast<const T*>(p.weight) + i);
#pragma unroll
    for (int j = 0; j < n; j++) v[j] = rounded<T>(v[j] * scale) * weight[j];
    store_values(static_cast<T*>(p.out) + row * p.width + i, v);
  }
}

// With y = x · s, s = rsqrt(mean x² + eps) and h = grad · weight: grad_x = s · (h − y · mean(h · y)).
template <class T, int n>
__global__ void __launch_bounds__(kThreads)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBackwardParams p, float* scales) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  __shared__ float shared[2][kWarps];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + p.x_layout.offset(row);
  const T* grad = static_cast<const T*>(p.grad) + p.grad_layout.offset(row);
  const T* grad_sum =
      p.grad_sum ? static_cast<const T*>(p.grad_sum) + p.grad_sum_layout.offset(row) : nullptr;
  const auto load = [&](int i, float (&v)[n], float (&h)[n]) {
    float weight[n];
    load_values(v, x + i);
    load_values(h, grad + i);
    load_values(weight, static_cast<const T*>(p.weight) + i);
#pragma unroll
    for (int j = 0; j < n; j++) h[j] *= weight[j];
  };
  float sums[2] = {};  // of squares, of products
  for (int i = threadIdx.x * n; i < p.width; i += kThreads * n) {
    float v[n], h[n];
    load(i, v, h);
#pragma unroll
    for (int j = 0; j < n; j++) {
      sums[0] = fmaf(v[j], v[j], sums[0]);
      sums[1] = fmaf(v[j], h[j], sums[1]);
    }
  }
  sum_over_cta(sums, shared);
  const float scale = inverse_root(sums[0], p.width, p.eps), mean = scale * sums[1] / p.width;
  if (scales && threadIdx.x == 0) scales[row] = scale;
  for (int i = threadIdx.x * n; i < p.width; i += kThreads * n) {
    float v[n], h[n];
    load(i, v, h);
#pragma unroll
    for (int j = 0; j < n; j++) v[j] = scale * (h[j] - v[j] * scale * mean);
    if (grad_sum) {
      float more[n];
      load_values(more, grad_sum + i);
#pragma unroll
      for (int j = 0; j < n; j++) v[j] += more[j];
    }
    store_values(static_cast<T*>(p.grad_x) + row * p.width + i, v);
  }
}

// The gradient of weight: a thread for each column and sum of rows_per_sum rows, ...
template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_weight_sums_kernel(const __grid_constant__ RmsNormBackwardParams p, const float* scales) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int tiles = (p.width - 1) / kThreads + 1;
  const int64_t item = blockIdx.x / tiles;
  const int column = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (column >= p.width) return;
  float sum = 0;
#pragma unroll 4
  for (int64_t row = item * p.rows_per_sum; row < min((item + 1) * p.rows_per_sum, p.rows); row++) {
    const float x = widen(static_cast<const T*>(p.x)[p.x_layout.offset(row) + column]);
    const float grad = widen(static_cast<const T*>(p.grad)[p.grad_layout.offset(row) + column]);
    sum = fmaf(grad, rounded<T>(x * scales[row]), sum);
  }
  p.weight_sums[item * p.width + column] = sum;
}
// ... whose sums are added in their order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_weight_gradient_kernel(const __grid_constant__ RmsNormBackwardParams p) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= p.width) return;
  float sum = 0;
  for (int64_t item = 0; item * p.rows_per_sum < p.rows; item++)
    sum += p.weight_sums[item * p.width + column];
  static_cast<T*>(p.grad_weight)[column] = T(sum);
}

}  // namespace

cudaError_t launch_rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.width == 0) return cudaSuccess;
  return with_type(p.dtype, [&]<class T>(T) {
    const bool vectors = in_vectors<T>(int64_t{p.width}) && in_vectors<T>(p.x, p.x_layout) &&
                         in_vectors<T>(p.residual, p.residual_layout) && in_vectors<T>(p.weight) &&
                         in_vectors<T>(p.out) && in_vectors<T>(p.sum);
    return with_vectors<T>(vectors, [&](auto n) {
      return launch_overlapping_ctas(rms_norm_kernel<T, n>, p.rows, kThreads, 0, stream, p);
    });
  });
}

cudaError_t launch_rms_norm_backward(const RmsNormBackwardParams& p, float* scales, cudaStream_t stream) {
  if (p.width == 0) return cudaSuccess;
  return with_type(p.dtype, [&]<class T>(T) {
    const bool vectors = in_vectors<T>(int64_t{p.width}) && in_vectors<T>(p.x, p.x_layout) &&
                         in_vectors<T>(p.grad, p.grad_layout) && in_vectors<T>(p.grad_x) &&
                         in_vectors<T>(p.grad_sum, p.grad_sum_layout) && in_vectors<T>(p.weight);
    return with_vectors<T>(vectors, [&](auto n) {
      return launch_overlapping_ctas(rms_norm_backward_kernel<T, n>, p.rows, kThreads, 0, stream, p, scales);
    });
  });
}

cudaError_t launch_rms_norm_weight_gradient(const RmsNormBackwardParams& p, const float* scales,
                                            cudaStream_t stream) {
  if (p.width == 0) return cudaSuccess;
  return with_type(p.dtype, [&]<class T>(T) {
    const int64_t tiles = (p.width - 1) / kThreads + 1;
    const int64_t items = (p.rows + p.rows_per_sum - 1) / p.rows_per_sum;
    const cudaError_t status = launch_overlapping_ctas(rms_norm_weight_sums_kernel<T>, tiles * items,
                                                       kThreads, 0, stream, p, scales);
    return status == cudaSuccess
               ? launch_overlapping_ctas(rms_norm_weight_gradient_kernel<T>, tiles, kThreads, 0, stream, p)
               : status;
  });
}

}  // namespace dllm::cuda
