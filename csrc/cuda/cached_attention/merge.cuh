// Merges the partial results of rows whose keys were split, in the order of the splits: a warp for each row.
#pragma once

#include "cuda/cached_attention/sequence_keys.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"
#include "cuda/tiles/float4.cuh"

namespace dllm::cuda {

template <class T>
__global__ void __launch_bounds__(32 * kMergeRows)
    merge_kernel(const __grid_constant__ SplitParams split_params) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const CachedAttentionParams& p = split_params.attention;
  __shared__ SpanBounds bounds[kMergeRows][kMaxSpanBounds];
  const int group = p.q_heads / p.kv_heads, row_tiles = (p.q_len * group + kMergeRows - 1) / kMergeRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = static_cast<int>(blockIdx.x % row_tiles) * kMergeRows + warp;
  const int kv_head = blockIdx.x / row_tiles % p.kv_heads;
  const int64_t batch = blockIdx.x / row_tiles / p.kv_heads;
  const SequenceKeys keys = sequence_keys(p, batch, bounds[warp]);
  const int live = keys.live * group;
  if (row >= live || keys.splits == 1) return;

  const int64_t first = partial_index(split_params, batch, 0, kv_head, live) + row;
  const int64_t stride = static_cast<int64_t>(p.kv_heads) * live;  // from split to split
  const float2* states = split_params.states + first;
  SoftmaxState merged;
  for (int split = lane; split < keys.splits; split += 32)
    merged.max = fmaxf(merged.max, states[split * stride].x);
  for (int other = 16; other > 0; other /= 2)
    merged.max = fmaxf(merged.max, __shfl_xor_sync(~0u, merged.max, other));

  constexpr int kGroups = 2;  // of four dims: 32 lanes hold up to 256
  float4 out[kGroups] = {};
#pragma unroll 4
  for (int split = 0; split < keys.splits; split++) {
    const float2 state = states[split * stride];
    const float weight = fast_exp2(state.x - merged.shift());
    const float* sums = split_params.sums + (first + split * stride) * p.head_dim;
    merged.sum = fmaf(state.y, weight, merged.sum);
#pragma unroll
    for (int c = 0; c < kGroups; c++) {
      const int d = (c * 32 + lane) * 4;
      if (d < p.head_dim) out[c] = add_scaled(out[c], load4(sums + d), weight);
    }
  }
  const GroupRows rows(p, batch, kv_head);
  if (lane == 0) p.lse[rows.lse_index(p, row)] = merged.log_sum_exp();
  T* to = rows.at<T>(p.out, p.out_layout, row);
#pragma unroll
  for (int c = 0; c < kGroups; c++) {
    const int d = (c * 32 + lane) * 4;
    if (d < p.head_dim) store4(to + d, scaled(out[c], merged.inverse_sum()));
  }
}

template <class T>
cudaError_t launch_merge(const SplitParams& p, cudaStream_t stream) {
  const CachedAttentionParams& a = p.attention;
  const int64_t rows = static_cast<int64_t>(a.q_len) * (a.q_heads / a.kv_heads);
  const int64_t ctas = (rows + kMergeRows - 1) / kMergeRows * a.kv_heads * a.batch;
  return launch_overlapping_ctas(merge_kernel<T>, ctas, 32 * kMergeRows, 0, stream, p);
}

}  // namespace dllm::cuda
