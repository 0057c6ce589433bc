// block_attention forward in float32 on the CUDA cores: a CTA takes 32 queries of one head past the keys they
// see, 32 at a time, with an online softmax in base 2.
#pragma once

#include "core/softmax_state.h"
#include "cuda/block_attention/fp32/launch.h"
#include "cuda/block_attention/fp32/tile_products.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"
#include "cuda/tiles/head_pointer.cuh"
#include "cuda/tiles/sequence_spans.cuh"

namespace dllm::cuda::fp32 {

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const BlockAttentionParams p) {
  constexpr int kKeys = kTileRows, kThreadKeys = kKeys / kRowThreads;
  constexpr int kRow = kRowWords<kDim>, kWeightRow = kRowWords<kKeys>;

  // ---- shared memory plan
  float* query = dynamic_shared<float>();  // [kTileRows][kRow], times scale and log2 e
  float* tile = query + kTileRows * kRow;  // [kKeys][kRow]: keys, then values
  float* weights = tile + kKeys * kRow;    // [kTileRows][kWeightRow]
  __shared__ SpanBounds bounds[kMaxSpanBounds];
  __shared__ VisibleKeys<kTileRows, kThreads> visible;

  // ---- which queries
  const int tiles = (p.q_len + kTileRows - 1) / kTileRows;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * kTileRows;  // longest first
  const int head = blockIdx.x / tiles % p.q_heads;
  const int64_t batch = blockIdx.x / tiles / p.q_heads;
  const int kv_head = head / (p.q_heads / p.kv_heads);
  const int live = min(p.q_len - first, kTileRows);
  const float* q = head_pointer<float>(p.q, p.q_layout, batch, head) + first * p.q_layout.position_stride;
  const float* k = head_pointer<float>(p.k, p.k_layout, batch, kv_head);
  const float* v = head_pointer<float>(p.v, p.v_layout, batch, kv_head);
  const SequenceSpans spans(p.spans, batch, p.kv_len);

  const int column = threadIdx.x % kRowThreads;
  const int row = threadIdx.x / kRowThreads * kThreadRows;  // the first of this thread's queries
  load_tile<kDim, kTileRows>(p.head_dim, p.scale * 1.44269504f, query,
                             [&](int i) { return i < live ? q + i * p.q_layout.position_stride : nullptr; });
  if (threadIdx.x < 32) tile_bounds(spans, first, live, bounds);
  __syncthreads();

  // ---- main loop over the key ranges that some query sees
  SoftmaxState state[kThreadRows];
  float4 out[kThreadRows][kDim / 64] = {};
  KeyWalk walk(bounds, spans.bounds_count(), kKeys);
  for (KeyRange keys = walk.next(); keys.begin < keys.end; keys = walk.next()) {
    const bool all_visible = keys.full && keys.end - keys.begin == kKeys;
    uint64_t seen = ~uint64_t{0};
    if (!all_visible)
      seen = visible.mark([&](int i) { return i < live ? spans.visible_keys(first + i, keys) : 0; });
    load_tile<kDim, kKeys>(p.head_dim, 1.0f, tile, [&](int i) {
      return seen >> i & 1 ? k + (keys.begin + i) * p.k_layout.position_stride : nullptr;
    });
    __syncthreads();

    float scores[kThreadRows][kThreadKeys] = {};
    add_row_products<kDim>(scores, query, row, tile, column, p.head_dim);
#pragma unroll
    for (int i = 0; i < kThreadRows; i++) {
      if (!all_visible) {
        const uint64_t bits = visible.of_query[row + i];
#pragma unroll
        for (int j = 0; j < kThreadKeys; j++)
          if (!(bits >> (column + j * kRowThreads) & 1)) scores[i][j] = -INFINITY;
      }
      SoftmaxState next = state[i];
#pragma unroll
      for (int j = 0; j < kThreadKeys; j++) next.max = fmaxf(next.max, scores[i][j]);
#pragma unroll
      for (int lane = kRowThreads / 2; lane > 0; lane /= 2)
        next.max = fmaxf(next.max, __shfl_xor_sync(~0u, next.max, lane));
      const float decay = exp2f(state[i].max - next.shift());
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kThreadKeys; j++) {
        const float weight = exp2f(scores[i][j] - next.shift());
        weights[(row + i) * kWeightRow + column + j * kRowThreads] = weight;
        sum += weight;
      }
#pragma unroll
      for (int lane = kRowThreads / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
      next.sum = fmaf(state[i].sum, decay, sum);
      state[i] = next;
#pragma unroll
      for (int c = 0; c < kDim / 64; c++) out[i][c] = scaled(out[i][c], decay);
    }

    __syncthreads();  // the keys were used, the weights are there
    load_tile<kDim, kKeys>(p.head_dim, 1.0f, tile, [&](int i) {
      return seen >> i & 1 ? v + (keys.begin + i) * p.v_layout.position_stride : nullptr;
    });
    __syncthreads();
    add_weighted_rows<kDim, kKeys>(out, weights, row, tile, column);
    __syncthreads();  // the values were used
  }

  // ---- epilogue
  float* to = head_pointer<float>(p.out, p.out_layout, batch, head) + first * p.out_layout.position_stride;
#pragma unroll
  for (int i = 0; i < kThreadRows; i++) {
    if (row + i >= live) continue;
#pragma unroll
    for (int c = 0; c < kDim / 64; c++) {
      const int d = c * 64 + column * 4;
      if (d < p.head_dim)
        store4(to + (row + i) * p.out_layout.position_stride + d, scaled(out[i][c], state[i].inverse_sum()));
    }
    if (column == 0) p.lse[(batch * p.q_heads + head) * p.q_len + first + row + i] = state[i].log_sum_exp();
  }
}

template <int kDim>
cudaError_t launch_forward(const BlockAttentionParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.q_len + kTileRows - 1) / kTileRows;
  return launch_ctas(forward_kernel<kDim>, tiles * p.q_heads * p.batch, kThreads, kForwardBytes<kDim>, stream,
                     p);
}

}  // namespace dllm::cuda::fp32
