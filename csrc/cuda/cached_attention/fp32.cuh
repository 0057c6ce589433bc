// cached_block_attention in float32 on the CUDA cores, in the splits and the order of the tensor-core
// kernels: a warp for each row, a lane for each key of a tile, then for each group of four dims.
#pragma once

#include "core/softmax_state.h"
#include "cuda/cached_attention/merge.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"
#include "cuda/tiles/float4.cuh"

namespace dllm::cuda {

constexpr int kLaneGroups = 2;  // 32 lanes hold up to 256 dims

__global__ void __launch_bounds__(32 * kCachedFp32Rows, 4)
    cached_fp32_kernel(const __grid_constant__ SplitParams split_params) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const CachedAttentionParams& p = split_params.attention;

  // ---- which row and keys
  const int group = p.q_heads / p.kv_heads,
            row_tiles = (p.q_len * group + kCachedFp32Rows - 1) / kCachedFp32Rows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = static_cast<int>(blockIdx.x % row_tiles) * kCachedFp32Rows, row = first + warp;
  const int kv_head = blockIdx.x / row_tiles % p.kv_heads;
  const int split = blockIdx.x / row_tiles / p.kv_heads % split_params.max_splits;
  const int64_t batch = blockIdx.x / row_tiles / p.kv_heads / split_params.max_splits;
  const SequenceKeys keys = planned_keys(split_params, batch);
  const GroupRows rows(p, batch, kv_head);
  const int live = keys.live * group;
  if (split >= keys.splits || (first >= live && split > 0)) return;
  const float* q = rows.at<float>(p.q, p.q_layout, row);

  // ---- past the key tiles of this split
  KeyRows<float> key_rows(p, batch, kv_head);
  SoftmaxState state;
  float4 out[kLaneGroups] = {};
  const int end = row < live ? keys.split_begin(split + 1) : 0;
  for (int t = keys.split_begin(split); t < end; t++) {
    const KeyTile tile = keys.tile(t);
    const auto seen = static_cast<unsigned>(
        spans_of(p, batch, keys.live, tile).visible_keys(rows.position(row), tile.range()));
    if (seen == 0) continue;
    key_rows.look_up(tile);
    const auto [key, value] = key_rows.rows(tile);
    float score = -INFINITY;
    if (seen >> lane & 1) {
      float sum = 0.0f;
#pragma unroll 2
      for (int d = 0; d < p.head_dim; d += 4) sum = dot(load4(q + d), load4(key + d), sum);
      score = sum * (p.scale * 1.44269504f);
    }

    SoftmaxState next = state;
    next.max = fmaxf(state.max, score);
    for (int other = 16; other > 0; other /= 2)
      next.max = fmaxf(next.max, __shfl_xor_sync(~0u, next.max, other));
    const float weight = exp2f(score - next.shift()), decay = exp2f(state.max - next.shift());
    float sum = weight;
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    next.sum = fmaf(state.sum, decay, sum);
    state = next;
#pragma unroll
    for (int c = 0; c < kLaneGroups; c++) out[c] = scaled(out[c], decay);
#pragma unroll 4
    for (int j = 0; j < kCachedKeys; j++) {
      const float key_weight = __shfl_sync(~0u, weight, j);
      const float* from = shuffled(value, j);
      if (!(seen >> j & 1)) continue;
#pragma unroll
      for (int c = 0; c < kLaneGroups; c++) {
        const int d = (c * 32 + lane) * 4;
        if (d < p.head_dim) out[c] = add_scaled(out[c], load4(from + d), key_weight);
      }
    }
  }

  // ---- epilogue: the result, or this split's part of it
  const auto store = [&](float* to, float factor) {
#pragma unroll
    for (int c = 0; c < kLaneGroups; c++) {
      const int d = (c * 32 + lane) * 4;
      if (d < p.head_dim) store4(to + d, scaled(out[c], factor));
    }
  };
  const bool is_split = keys.splits > 1 && first < live;
  if (is_split && row < live) {
    const int64_t partial = partial_index(split_params, batch, split, kv_head, live) + row;
    if (lane == 0) split_params.states[partial] = {state.max, state.sum};
    store(split_params.sums + partial * p.head_dim, 1.0f);
  } else if (row < p.q_len * group && (row < live || split == 0)) {
    if (lane == 0) p.lse[rows.lse_index(p, row)] = state.log_sum_exp();
    store(rows.at<float>(p.out, p.out_layout, row), state.inverse_sum());
  }
  if (!is_split) return;
  unsigned* const finished =
      split_params.plan.counters + (batch * p.kv_heads + kv_head) * row_tiles + first / kCachedFp32Rows;
  if (is_last_cta(finished, keys.splits))
    merge_rows<1, kLaneGroups, float>(split_params, rows, keys, first, min(first + kCachedFp32Rows, live));
}

}  // namespace dllm::cuda
