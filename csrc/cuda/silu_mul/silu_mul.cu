// A thread for each vector of values.
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"
#include "cuda/silu_mul/launch.h"
#include "cuda/vectors.cuh"

namespace dllm::cuda {
namespace {

constexpr int kThreads = 256;

// σ(x) and 1 − σ(x), both without cancellation, from e^−|x|.
struct Sigmoid {
  float value, rest;

  __device__ explicit Sigmoid(float x) {
    const float e = expf(-fabsf(x)), larger = 1.0f / (1.0f + e), smaller = e * larger;
    value = x < 0 ? smaller : larger;
    rest = x < 0 ? larger : smaller;
  }
};

template <class T, int n>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(const __grid_constant__ SiluMulParams p) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * n;
  const int64_t row = at / p.width, column = at % p.width;
  if (row >= p.rows) return;
  float gate[n], up[n];
  load_values(gate, static_cast<const T*>(p.gate) + p.gate_layout.offset(row) + column);
  load_values(up, static_cast<const T*>(p.up) + p.up_layout.offset(row) + column);
  if (!p.grad) {
#pragma unroll
    for (int i = 0; i < n; i++) up[i] *= rounded<T>(gate[i] * Sigmoid(gate[i]).value);
    store_values(static_cast<T*>(p.out) + at, up);
    return;
  }
  float grad[n];
  load_values(grad, static_cast<const T*>(p.grad) + p.grad_layout.offset(row) + column);
#pragma unroll
  for (int i = 0; i < n; i++) {
    const float x = gate[i];
    const Sigmoid s(x);
    gate[i] = grad[i] * up[i] * (s.value * (1.0f + x * s.rest));
    up[i] = grad[i] * rounded<T>(x * s.value);
  }
  store_values(static_cast<T*>(p.grad_gate) + at, gate);
  store_values(static_cast<T*>(p.grad_up) + at, up);
}

}  // namespace

cudaError_t launch_silu_mul(const SiluMulParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.width == 0) return cudaSuccess;
  return with_type(p.dtype, [&]<class T>(T) {
    const bool vectors = in_vectors<T>(int64_t{p.width}) && in_vectors<T>(p.gate, p.gate_layout) &&
                         in_vectors<T>(p.up, p.up_layout) && in_vectors<T>(p.grad, p.grad_layout) &&
                         in_vectors<T>(p.out) && in_vectors<T>(p.grad_gate) && in_vectors<T>(p.grad_up);
    return with_vectors<T>(vectors, [&](auto n) {
      const int64_t ctas = (p.rows * (p.width / n) - 1) / kThreads + 1;
      return launch_overlapping_ctas(silu_mul_kernel<T, n>, ctas, kThreads, 0, stream, p);
    });
  });
}

}  // namespace dllm::cuda
