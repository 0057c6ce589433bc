// token_stats on CUDA. First kernel: grid (range, row); a thread reads 16 bytes at a time, keeps a
// TokenState in registers, and the CTA merges them into states[row, range]. Second kernel: a warp per row
// merges the ranges and writes the statistics. Fixed orders throughout, no atomics.
#pragma once

#include "core/gumbel.h"
#include "core/philox.h"
#include "cuda/token_stats/row_state.cuh"

namespace dllm::cuda {

// Adds `n` confidence logits, none of them NaN or +inf. Once a row's largest values are seen, the first
// branch is rare.
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
    state.sum += e;
    state.weighted += e * shifted;
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

template <class T, class Real>
__global__ void __launch_bounds__(kStatsThreads, 1)
    token_states_kernel(const __grid_constant__ TokenStatsParams p) {
  constexpr int kIds = 16 / sizeof(T);  // ids in one load: one or two Philox blocks
  __shared__ TokenState<Real> warp_states[kStatsWarps];
  const int64_t row = row_of_cta();
  if (row >= p.rows) return;
  const RowIdentity identity = row_identity(p, row);
  if (!identity.masked) return;
  const int32_t begin = blockIdx.x * kStatsRange;
  const int32_t end = min(static_cast<int64_t>(p.vocabulary), static_cast<int64_t>(begin) + kStatsRange);
  const T* logits = row_of<const T>(p.logits, row);
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const TokenCut cut = p.cuts ? p.cuts[row] : TokenCut();

  TokenState<Real> state;
  for (int32_t first = begin + threadIdx.x * kIds; first < end; first += kStatsThreads * kIds) {
    float x[kIds], score[kIds];
    unpack<T>(load_ids(logits, first, end, aligned), x);
#pragma unroll
    for (int i = 0; i < kIds; i++) x[i] = tame(x[i]);
    bar(p.suppress, first, x);
    if (p.cuts) {
#pragma unroll
      for (int i = 0; i < kIds; i++) {
        const float scaled = tame(x[i] * p.confidence_scale);
        const bool kept = scaled > cut.lowest || (scaled == cut.lowest && first + i <= cut.last_tie);
        x[i] = kept ? x[i] : -HUGE_VALF;
      }
    }
#pragma unroll
    for (int block = 0; block < kIds; block += 4) {
      RandomWords words{};
      if (p.temperature > 0)
        words = philox(p.seed, (first + block) / 4, identity.position, identity.step, identity.sequence);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        ExactFloat noised = x[block + i];
        if (p.temperature > 0) noised = noised + gumbel<OneLane>(words.word[i]) * p.temperature;
        score[block + i] = noised.value;
      }
    }
    bar(p.proposal_exclude, first, score);
    propose(state, score, first);
#pragma unroll
    for (int i = 0; i < kIds; i++) x[i] = tame(x[i] * p.confidence_scale);
    bar(p.confidence_exclude, first, x);
    add_confidence(state, x);
  }

  state = merged_lanes(state);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) warp_states[warp] = state;
  __syncthreads();
  if (warp > 0) return;
  state = merged_lanes(lane < kStatsWarps ? warp_states[lane] : TokenState<Real>());
  if (lane == 0) static_cast<TokenState<Real>*>(p.states)[row * gridDim.x + blockIdx.x] = state;
}

template <class T, class Real>
__global__ void __launch_bounds__(kStatsThreads)
    token_results_kernel(const __grid_constant__ TokenStatsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kStatsWarps + threadIdx.x / 32;
  if (row >= p.rows || !row_identity(p, row).masked) return;
  const TokenState<Real> state = merged_ranges<Real>(p, row);
  if (threadIdx.x % 32 > 0) return;
  Real x = -HUGE_VALF;
  if (state.token >= 0 && !listed(p.confidence_exclude, state.token))
    x = tame(tame(widen(row_of<const T>(p.logits, row)[state.token])) * p.confidence_scale);
  const int32_t fallback = p.cuts ? p.cuts[row].fallback : p.fallback;
  const TokenResult<Real> result = finish(state, x, fallback, p.vocabulary);
  p.token[row] = result.token;
  static_cast<Real*>(p.prob)[row] = result.prob;
  static_cast<Real*>(p.margin)[row] = result.margin;
  static_cast<Real*>(p.entropy)[row] = result.entropy;
  static_cast<Real*>(p.logsumexp)[row] = result.logsumexp;
}

}  // namespace dllm::cuda
