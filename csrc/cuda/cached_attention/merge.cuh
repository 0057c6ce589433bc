// Merges the partial results of rows whose keys were split, in the order of the splits whichever CTA does it:
// the one that comes last.
#pragma once

#include "cuda/cached_attention/sequence_keys.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tiles/float4.cuh"

namespace dllm::cuda {

// Whether this CTA is the last of `count` to come here, in all its threads, which call it together; what the
// others wrote before is then seen. A counter is 0 before the first CTA comes and after the last.
__device__ inline bool is_last_cta(unsigned* counter, int count) {
  __syncthreads();  // all threads have written
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, count - 1) == static_cast<unsigned>(count - 1);
    __threadfence();
  }
  return __syncthreads_or(last);
}

// Rows [first, end) of a kv head, among all warps of the CTA; a warp merges kRows at a time, so that many
// loads are under way. kGroups: of 128 dims.
template <int kRows, int kGroups, class T>
__device__ void merge_rows(const SplitParams& split_params, const GroupRows& rows, const SequenceKeys& keys,
                           int first, int end) {
  const CachedAttentionParams& p = split_params.attention;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int live = keys.live * rows.group;
  const int64_t partial = partial_index(split_params, rows.batch, 0, rows.kv_head, live);
  const int64_t stride = static_cast<int64_t>(p.kv_heads) * live;  // from split to split
  const auto state = [&](int row, int split) { return split_params.states[partial + row + split * stride]; };

  for (int begin = first + warp * kRows; begin < end; begin += warps * kRows) {
    const auto row = [&](int i) { return min(begin + i, end - 1); };
    SoftmaxState merged[kRows];
    for (int split = lane; split < keys.splits; split += 32) {
#pragma unroll
      for (int i = 0; i < kRows; i++) merged[i].max = fmaxf(merged[i].max, state(row(i), split).x);
    }
#pragma unroll
    for (int i = 0; i < kRows; i++)
      for (int other = 16; other > 0; other /= 2)
        merged[i].max = fmaxf(merged[i].max, __shfl_xor_sync(~0u, merged[i].max, other));

    float4 out[kRows][kGroups] = {};
    for (int chunk = 0; chunk < keys.splits; chunk += 32) {
      float weights[kRows], sums[kRows];  // of this lane's split
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        const float2 mine = state(row(i), min(chunk + lane, keys.splits - 1));
        weights[i] = fast_exp2(mine.x - merged[i].shift());
        sums[i] = mine.y;
      }
      const int count = min(keys.splits - chunk, 32);
#pragma unroll 2
      for (int s = 0; s < count; s++) {
#pragma unroll
        for (int i = 0; i < kRows; i++) {
          const float weight = __shfl_sync(~0u, weights[i], s);
          merged[i].sum = fmaf(__shfl_sync(~0u, sums[i], s), weight, merged[i].sum);
          const float* from = split_params.sums + (partial + row(i) + (chunk + s) * stride) * p.head_dim;
#pragma unroll
          for (int c = 0; c < kGroups; c++) {
            const int d = (c * 32 + lane) * 4;
            if (d < p.head_dim) out[i][c] = add_scaled(out[i][c], load4(from + d), weight);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      if (begin + i >= end) break;
      if (lane == 0) p.lse[rows.lse_index(p, begin + i)] = merged[i].log_sum_exp();
      T* to = rows.at<T>(p.out, p.out_layout, begin + i);
#pragma unroll
      for (int c = 0; c < kGroups; c++) {
        const int d = (c * 32 + lane) * 4;
        if (d < p.head_dim) store4(to + d, scaled(out[i][c], merged[i].inverse_sum()));
      }
    }
  }
}

}  // namespace dllm::cuda
