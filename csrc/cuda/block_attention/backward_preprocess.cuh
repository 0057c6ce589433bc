// What the backward kernels need to know of every query besides its rows, made once per call.
#pragma once

#include "cuda/block_attention/config.h"
#include "cuda/block_attention/launch.h"
#include "cuda/launch_kernel.h"
#include "cuda/tiles/head_pointer.cuh"

namespace dllm::cuda {

__device__ inline float dot16(const float* a, const float* b) {  // of 16 bytes each
  const float4 x = *reinterpret_cast<const float4*>(a), y = *reinterpret_cast<const float4*>(b);
  return fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, x.w * y.w)));
}
template <class T>
__device__ float dot16(const T* a, const T* b) {
  const uint4 x = *reinterpret_cast<const uint4*>(a), y = *reinterpret_cast<const uint4*>(b);
  const T *left = reinterpret_cast<const T*>(&x), *right = reinterpret_cast<const T*>(&y);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) sum = fmaf(static_cast<float>(left[i]), static_cast<float>(right[i]), sum);
  return sum;
}

// terms [batch, q_heads, padded_queries]: with P = 2^(scale log2(e) k·q - x) and dS = P (dO·v - y). Eight
// lanes take a query. Positions beyond q_len and queries that see nothing get x = inf, which makes P 0.
template <class T>
__global__ void backward_preprocess_kernel(const BlockAttentionBackwardParams p,
                                           const BackwardWorkspace workspace) {
  const BlockAttentionParams& f = p.forward;
  const int padded = workspace.padded_queries;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kTermLanes;
  const int position = static_cast<int>(index % padded), lane = threadIdx.x % kTermLanes;
  const int head = static_cast<int>(index / padded % f.q_heads);
  const int64_t batch = index / padded / f.q_heads;
  const bool live = batch < f.batch && position < f.q_len;
  float sum = 0.0f;
  if (live) {
    const T* out =
        head_pointer<T>(f.out, f.out_layout, batch, head) + position * f.out_layout.position_stride;
    const T* grad = head_pointer<T>(p.grad_out, p.grad_out_layout, batch, head) +
                    position * p.grad_out_layout.position_stride;
    constexpr int kStep = 16 / sizeof(T);
    for (int d = lane * kStep; d < f.head_dim; d += kTermLanes * kStep) sum += dot16(out + d, grad + d);
  }
#pragma unroll
  for (int other = kTermLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  if (lane > 0 || batch >= f.batch) return;
  float2 terms = {INFINITY, 0.0f};
  if (live) {
    const int64_t row = (batch * f.q_heads + head) * f.q_len + position;
    if (f.lse[row] != -INFINITY) terms.x = f.lse[row] * 1.44269504f;
    terms.y = p.grad_lse ? sum - p.grad_lse[row] : sum;
  }
  workspace.terms[index] = terms;
}

template <class T>
cudaError_t launch_backward_preprocess(const BlockAttentionBackwardParams& p,
                                       const BackwardWorkspace& workspace, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const BlockAttentionParams& f = p.forward;
  const int64_t lanes = static_cast<int64_t>(f.batch) * f.q_heads * workspace.padded_queries * kTermLanes;
  return launch_ctas(backward_preprocess_kernel<T>, (lanes + kThreads - 1) / kThreads, kThreads, 0, stream, p,
                     workspace);
}

}  // namespace dllm::cuda
