// What the token_stats kernels share: which row they work on, and how token states merge across threads.
#pragma once

#include "core/token_state.h"
#include "cuda/logits.cuh"
#include "cuda/token_stats/launch.h"

namespace dllm::cuda {

// Sequence, position, step; `masked` is false for rows that nothing will be committed to.
struct RowIdentity {
  int32_t sequence, position, step;
  bool masked;
};

__device__ inline RowIdentity row_identity(const RowStatsParams& p, int32_t row) {
  const MaskedBlocks& block = p.blocks;
  if (!block.canvas) {
    if (!p.noise_ids) return {0, row, 0, true};
    const int32_t* ids = p.noise_ids + 3 * static_cast<int64_t>(row);
    return {ids[0], ids[1], ids[2], true};
  }
  const int32_t b = row / block.block;
  const int64_t position = block.block_start[b] + static_cast<int64_t>(row % block.block);
  bool masked = position >= 0 && position < block.length;
  if (masked) {
    const int64_t at = b * block.canvas_stride + position;
    masked = (block.canvas_is_int64 ? static_cast<const int64_t*>(block.canvas)[at]
                                    : static_cast<const int32_t*>(block.canvas)[at]) == block.mask_id;
  }
  return {block.sequence_ids ? block.sequence_ids[b] : b, static_cast<int32_t>(position),
          block.step ? block.step[b] : 0, masked};
}

// A grid of (anything, rows): rows run over y and z, which are limited. Beyond the last row: a row out of
// range, perhaps below 0.
__device__ inline int32_t row_of_cta() { return static_cast<int32_t>(blockIdx.y + gridDim.y * blockIdx.z); }

// The highest of a warp's values, none of them NaN; integers of the same order take one instruction.
__device__ inline float warp_max(float x) {
  const auto ordered = [](int bits) { return bits < 0 ? bits ^ 0x7FFFFFFF : bits; };
  return __int_as_float(ordered(__reduce_max_sync(kAllLanes, ordered(__float_as_int(x)))));
}

template <class Real>
__device__ Real warp_sum(Real x) {
  for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

// Every lane gets the state of all lanes. Maxima are floats, whatever the arithmetic.
template <class Real>
__device__ TokenState<Real> merged_lanes(TokenState<Real> state) {
  TokenState<Real> all;
  all.score = warp_max(state.score);
  const auto token = static_cast<unsigned>(state.score == all.score ? state.token : -1);
  all.token = static_cast<int32_t>(__reduce_min_sync(kAllLanes, token));
  const float max = warp_max(static_cast<float>(state.max));
  const unsigned holders = __ballot_sync(kAllLanes, state.max == max);
  const bool first_holder = threadIdx.x % 32 + 1 == static_cast<unsigned>(__ffs(holders));
  all.max = max;
  all.second = warp_max(static_cast<float>(first_holder ? state.second : state.max));
  raise_max(state, all.max);
  all.sum = warp_sum(state.sum);
  all.weighted = warp_sum(state.weighted);
  return all;
}

// Every lane gets the state of all ranges of a row.
template <class Real>
__device__ TokenState<Real> merged_ranges(const TokenState<Real>* states, int ranges) {
  const int lane = threadIdx.x % 32;
  TokenState<Real> state;
  for (int first = 0; first < ranges; first += 32)
    merge(state, merged_lanes(first + lane < ranges ? states[first + lane] : TokenState<Real>()));
  return state;
}
template <class Real>
__device__ TokenState<Real> merged_ranges(const RowStatsParams& p, int32_t row) {
  const int ranges = stats_ranges(p.vocabulary);
  return merged_ranges(static_cast<const TokenState<Real>*>(p.states) + static_cast<int64_t>(row) * ranges,
                       ranges);
}

template <class Real>
__device__ void write_result(const RowStatsParams& p, int64_t row, const TokenResult<Real>& result) {
  p.token[row] = result.token;
  static_cast<Real*>(p.prob)[row] = result.prob;
  static_cast<Real*>(p.margin)[row] = result.margin;
  static_cast<Real*>(p.entropy)[row] = result.entropy;
  static_cast<Real*>(p.logsumexp)[row] = result.logsumexp;
}

// The logits of one load, −inf beyond `end`.
template <class T>
__device__ uint4 load_ids(const T* logits, int32_t first, int32_t end, bool aligned) {
  constexpr int kIds = 16 / sizeof(T);
  if (aligned && first + kIds <= end) return *reinterpret_cast<const uint4*>(logits + first);
  T value[kIds];
#pragma unroll
  for (int i = 0; i < kIds; i++) value[i] = first + i < end ? logits[first + i] : T(-HUGE_VALF);
  return packed(value);
}

}  // namespace dllm::cuda
