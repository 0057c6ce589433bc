// What becomes of a few neighbouring logits of a row: noise, lists of ids, proposal and confidence.
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

// Adds `n` logits, none of them NaN or +inf, of ids first, first + 1, …, where `first` and `n` are multiples
// of 4: one Philox block for four ids.
template <int n, class Real>
__device__ void add_ids(TokenState<Real>& state, const RowStatsParams& p, const RowIdentity& identity,
                        int32_t first, float (&x)[n]) {
  float score[n];
  bar(p.suppress, first, x);
#pragma unroll
  for (int block = 0; block < n; block += 4) {
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
  for (int i = 0; i < n; i++) x[i] = tame(x[i] * p.confidence_scale);
  bar(p.confidence_exclude, first, x);
  add_confidence(state, x);
}

}  // namespace dllm::cuda
