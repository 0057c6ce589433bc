// token_stats on CUDA. First kernel: grid (range, row); a thread reads 16 bytes at a time, keeps a
// TokenState in registers, and the CTA merges them into states[row, range]. Second kernel: a warp per row
// merges the ranges and writes the statistics. Fixed orders throughout, no atomics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

#include "core/gumbel.h"
#include "core/philox.h"
#include "core/token_state.h"
#include "cuda/token_stats/launch.h"

namespace dllm::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kStatsWarps = kStatsThreads / 32;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// NaN becomes −inf, +inf the largest float, as on the CPU.
__device__ inline float tame(float x) { return fminf(fmaxf(x, -HUGE_VALF), FLT_MAX); }

__device__ inline bool listed(const TokenIds& list, int32_t id) {
  for (int i = 0; i < list.count; i++)
    if (list.ids[i] == id) return true;
  return false;
}

__device__ inline bool any_listed(const TokenIds& list, int32_t begin, int32_t end) {
  for (int i = 0; i < list.count; i++)
    if (list.ids[i] >= begin && list.ids[i] < end) return true;
  return false;
}

// Sequence, position, step; `masked` is false for rows that nothing will be committed to.
struct RowIdentity {
  int32_t sequence, position, step;
  bool masked;
};

__device__ inline RowIdentity row_identity(const TokenStatsParams& p, int64_t row) {
  const BlockRows& block = p.block;
  if (!block.canvas) {
    if (!p.noise_ids) return {0, static_cast<int32_t>(row), 0, true};
    return {p.noise_ids[3 * row], p.noise_ids[3 * row + 1], p.noise_ids[3 * row + 2], true};
  }
  const int64_t b = row / block.block, position = block.block_start[b] + row % block.block;
  bool masked = position >= 0 && position < block.length;
  if (masked) {
    const int64_t at = b * block.canvas_stride + position;
    masked = (block.canvas_is_int64 ? static_cast<const int64_t*>(block.canvas)[at]
                                    : static_cast<const int32_t*>(block.canvas)[at]) == block.mask_id;
  }
  return {block.sequence_ids ? block.sequence_ids[b] : static_cast<int32_t>(b),
          static_cast<int32_t>(position), block.step ? block.step[b] : 0, masked};
}

template <class T>
__device__ const T* row_logits(const TokenStatsParams& p, int64_t row) {
  return static_cast<const T*>(p.logits) + row / p.inner * p.outer_stride + row % p.inner * p.inner_stride;
}

__device__ inline float exponential(float x) { return exp2f(x * 1.44269504f); }
__device__ inline double exponential(double x) { return exp(x); }

// Adds `n` confidence logits. Once a row's largest values are seen, both branches are rare.
template <int n, class Real>
__device__ void add_confidence(TokenState<Real>& state, const float (&x)[n]) {
  float highest = x[0];
#pragma unroll
  for (int i = 1; i < n; i++) highest = fmaxf(highest, x[i]);
  if (highest > state.second) {
    float first = static_cast<float>(state.max), second = static_cast<float>(state.second);
#pragma unroll
    for (int i = 0; i < n; i++) {
      second = fmaxf(second, fminf(first, x[i]));
      first = fmaxf(first, x[i]);
    }
    raise_max(state, static_cast<Real>(first));
    state.second = second;
  }
  if (!(highest > -HUGE_VALF)) return;
#pragma unroll
  for (int i = 0; i < n; i++) {
    // The bound keeps −inf out of the product; what lies below it is under every rounding of the sum.
    const Real shifted = fmax(static_cast<Real>(x[i]) - state.max, static_cast<Real>(-87));
    const Real e = exponential(shifted);
    state.sum += x[i] > -HUGE_VALF ? e : Real(0);
    state.weighted += x[i] > -HUGE_VALF ? e * shifted : Real(0);
  }
}

template <int n, class Real>
__device__ void propose(TokenState<Real>& state, const float (&score)[n], int32_t first) {
  float highest = score[0];
#pragma unroll
  for (int i = 1; i < n; i++) highest = fmaxf(highest, score[i]);
  if (!(highest > state.score)) return;
  state.score = highest;
#pragma unroll
  for (int i = n - 1; i >= 0; i--)
    if (score[i] == highest) state.token = first + i;
}

template <class Real>
__device__ TokenState<Real> shuffle_down(const TokenState<Real>& state, int delta) {
  TokenState<Real> other;
  other.score = __shfl_down_sync(kAllLanes, state.score, delta);
  other.token = __shfl_down_sync(kAllLanes, state.token, delta);
  other.max = __shfl_down_sync(kAllLanes, state.max, delta);
  other.second = __shfl_down_sync(kAllLanes, state.second, delta);
  other.sum = __shfl_down_sync(kAllLanes, state.sum, delta);
  other.weighted = __shfl_down_sync(kAllLanes, state.weighted, delta);
  return other;
}

// Lane 0 ends with the state of the first `lanes` lanes, a power of two.
template <class Real>
__device__ void merge_lanes(TokenState<Real>& state, int lanes) {
  for (int delta = lanes / 2; delta; delta /= 2) merge(state, shuffle_down(state, delta));
}

// kPlain: temperature 0, no excluded ids, confidence temperature 1: the score is the confidence logit.
template <class T, class Real, bool kPlain>
__global__ void __launch_bounds__(kStatsThreads, 1)
    token_states_kernel(const __grid_constant__ TokenStatsParams p) {
  constexpr int kIds = 16 / sizeof(T);  // ids in one load: one or two Philox blocks
  constexpr int kLoads = kPlain ? kStatsLoads : 1;
  __shared__ TokenState<Real> warp_states[kStatsWarps];
  const int64_t row = blockIdx.y + static_cast<int64_t>(gridDim.y) * blockIdx.z;
  if (row >= p.rows) return;
  const RowIdentity identity = row_identity(p, row);
  if (!identity.masked) return;
  const int32_t begin = blockIdx.x * kStatsRange;
  const int32_t end = min(static_cast<int64_t>(p.vocabulary), static_cast<int64_t>(begin) + kStatsRange);
  const T* logits = row_logits<T>(p, row);
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const bool some_suppressed = any_listed(p.suppress, begin, end);

  TokenState<Real> state;
  for (int32_t base = begin + threadIdx.x * kIds; base < end; base += kLoads * kStatsThreads * kIds) {
    float x[kLoads][kIds];
#pragma unroll
    for (int load = 0; load < kLoads; load++) {
      const int32_t first = base + load * kStatsThreads * kIds;
      if (aligned && first + kIds <= end) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(logits + first));
        T value[kIds];
        memcpy(value, &raw, sizeof raw);
#pragma unroll
        for (int i = 0; i < kIds; i++) x[load][i] = tame(widen(value[i]));
      } else {
#pragma unroll
        for (int i = 0; i < kIds; i++)
          x[load][i] = first + i < end ? tame(widen(logits[first + i])) : -HUGE_VALF;
      }
    }
#pragma unroll
    for (int load = 0; load < kLoads; load++) {
      const int32_t first = base + load * kStatsThreads * kIds;
      if (some_suppressed) {
#pragma unroll
        for (int i = 0; i < kIds; i++)
          if (listed(p.suppress, first + i)) x[load][i] = -HUGE_VALF;
      }
      if constexpr (kPlain) {
        propose(state, x[load], first);
      } else {
        float score[kIds];
#pragma unroll
        for (int block = 0; block < kIds; block += 4) {
          RandomWords words{};
          if (p.temperature > 0)
            words = philox(p.seed, (first + block) / 4, identity.position, identity.step, identity.sequence);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            ExactFloat noised = x[load][block + i];
            if (p.temperature > 0) noised = noised + gumbel<OneLane>(words.word[i]) * p.temperature;
            score[block + i] = noised.value;
          }
        }
#pragma unroll
        for (int i = 0; i < kIds; i++) {
          if (listed(p.proposal_exclude, first + i)) score[i] = -HUGE_VALF;
          x[load][i] =
              listed(p.confidence_exclude, first + i) ? -HUGE_VALF : tame(x[load][i] * p.confidence_scale);
        }
        propose(state, score, first);
      }
      add_confidence(state, x[load]);
    }
  }

  merge_lanes(state, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) warp_states[warp] = state;
  __syncthreads();
  if (warp > 0) return;
  state = lane < kStatsWarps ? warp_states[lane] : TokenState<Real>();
  merge_lanes(state, kStatsWarps);
  if (lane == 0) static_cast<TokenState<Real>*>(p.states)[row * gridDim.x + blockIdx.x] = state;
}

template <class T, class Real>
__global__ void __launch_bounds__(kStatsThreads)
    token_results_kernel(const __grid_constant__ TokenStatsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kStatsWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, ranges = stats_ranges(p.vocabulary);
  if (row >= p.rows || !row_identity(p, row).masked) return;
  const auto* states = static_cast<const TokenState<Real>*>(p.states) + row * ranges;
  TokenState<Real> state;
  for (int first = 0; first < ranges; first += 32) {
    TokenState<Real> some = first + lane < ranges ? states[first + lane] : TokenState<Real>();
    merge_lanes(some, 32);
    merge(state, some);
  }
  if (lane > 0) return;
  Real x = -HUGE_VALF;
  if (state.token >= 0 && !listed(p.confidence_exclude, state.token)) {
    const float logit = tame(widen(row_logits<T>(p, row)[state.token]));
    x = p.confidence_scale == 1 ? logit : tame(logit * p.confidence_scale);
  }
  const TokenResult<Real> result = finish(state, x, p.fallback, p.vocabulary);
  p.token[row] = result.token;
  static_cast<Real*>(p.prob)[row] = result.prob;
  static_cast<Real*>(p.margin)[row] = result.margin;
  static_cast<Real*>(p.entropy)[row] = result.entropy;
  static_cast<Real*>(p.logsumexp)[row] = result.logsumexp;
}

}  // namespace dllm::cuda
