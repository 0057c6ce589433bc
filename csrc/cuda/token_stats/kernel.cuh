// token_stats on CUDA. First kernel: grid (range, row); a thread reads 16 bytes at a time, keeps a
// TokenState in registers, and the CTA merges them into states[row, range]. Second kernel: a warp per row
// merges the ranges and writes the statistics. Fixed orders throughout, no atomics.
#pragma once

#include "cuda/token_stats/add_ids.cuh"

namespace dllm::cuda {

template <class T, class Real>
__global__ void __launch_bounds__(kStatsThreads, 1)
    token_states_kernel(const __grid_constant__ RowStatsParams p) {
  constexpr int kIds = 16 / sizeof(T);  // ids in one load: one or two Philox blocks
  __shared__ TokenState<Real> warp_states[kStatsWarps];
  const int32_t row = row_of_cta();
  if (row < 0 || row >= p.rows) return;
  const RowIdentity identity = row_identity(p, row);
  if (!identity.masked) return;
  const int32_t begin = blockIdx.x * kStatsRange;
  const int32_t end = min(static_cast<int64_t>(p.vocabulary), static_cast<int64_t>(begin) + kStatsRange);
  const T* logits = row_of<const T>(p.logits, row);
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const TokenCut cut = p.cuts ? p.cuts[row] : TokenCut();

  TokenState<Real> state;
  for (int32_t first = begin + threadIdx.x * kIds; first < end; first += kStatsThreads * kIds) {
    float x[kIds];
    unpack<T>(load_ids(logits, first, end, aligned), x);
#pragma unroll
    for (int i = 0; i < kIds; i++) x[i] = tame(x[i]);
    if (p.cuts) {
#pragma unroll
      for (int i = 0; i < kIds; i++) {
        const float scaled = tame(x[i] * p.confidence_scale);
        const bool kept = scaled > cut.lowest || (scaled == cut.lowest && first + i <= cut.last_tie);
        x[i] = kept ? x[i] : -HUGE_VALF;
      }
    }
    add_ids(state, p, identity, first, x);
  }

  state = merged_lanes(state);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) warp_states[warp] = state;
  __syncthreads();
  if (warp > 0) return;
  state = merged_lanes(lane < kStatsWarps ? warp_states[lane] : TokenState<Real>());
  if (lane == 0)
    static_cast<TokenState<Real>*>(p.states)[static_cast<int64_t>(row) * gridDim.x + blockIdx.x] = state;
}

template <class T, class Real>
__global__ void __launch_bounds__(kStatsThreads)
    token_results_kernel(const __grid_constant__ RowStatsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kStatsWarps + threadIdx.x / 32;
  if (row >= p.rows || !row_identity(p, row).masked) return;
  const TokenState<Real> state = merged_ranges<Real>(p, row);
  if (threadIdx.x % 32 > 0) return;
  Real x = -HUGE_VALF;
  if (state.token >= 0 && !listed(p.confidence_exclude, state.token))
    x = tame(tame(widen(row_of<const T>(p.logits, row)[state.token])) * p.confidence_scale);
  const int32_t fallback = p.cuts ? p.cuts[row].fallback : p.fallback;
  write_result(p, row, finish(state, x, fallback, p.vocabulary));
}

}  // namespace dllm::cuda
