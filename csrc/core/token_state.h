// What one pass over a row of logits keeps: enough for the proposal and every kind of confidence.
// A state covers some token ids; states of other ids are merged into it in a fixed order.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace dllm {

// Real: float, or double for precision="float64".
template <class Real>
struct TokenState {
  // Proposal: the highest score (logit, plus noise when the temperature is not 0) and its token id;
  // −1 while no score was above −inf.
  float score = -HUGE_VALF;
  int32_t token = -1;
  // Softmax over x = logit / confidence temperature, e = exp(x − max).
  Real max = -HUGE_VALF;
  Real second = -HUGE_VALF;  // second highest x; equal to max when two tie
  Real sum = 0;              // Σ e
  Real weighted = 0;         // Σ e·(x − max)
};

// Raises `state.max` to `max`, keeping the sums' meaning.
template <class Real>
DLLM_HOST_DEVICE void raise_max(TokenState<Real>& state, Real max) {
  if (!(max > state.max)) return;
  if (state.sum > 0) {
    const Real shift = state.max - max, scale = std::exp(shift);
    state.weighted = scale > 0 ? scale * (state.weighted + shift * state.sum) : Real(0);
    state.sum *= scale;
  }
  state.max = max;
}

// Adds the state of other token ids. Equal scores keep the lower id.
template <class Real>
DLLM_HOST_DEVICE void merge(TokenState<Real>& state, TokenState<Real> other) {
  if (other.score > state.score || (other.score == state.score && other.token < state.token)) {
    state.score = other.score;
    state.token = other.token;
  }
  const Real lower_max = state.max < other.max ? state.max : other.max;
  const Real second = state.second > other.second ? state.second : other.second;
  raise_max(state, other.max);
  raise_max(other, state.max);
  state.second = second > lower_max ? second : lower_max;
  state.sum += other.sum;
  state.weighted += other.weighted;
}

template <class Real>
struct TokenResult {
  int64_t token;
  Real prob, margin, entropy, logsumexp;
};

// `x` is the proposal's logit / confidence temperature, −inf where the proposal is outside the softmax:
// then prob and margin are 0. Without any finite logit: token `fallback`, prob 0, the entropy of a
// uniform distribution over `vocabulary` ids, logsumexp −inf.
template <class Real>
DLLM_HOST_DEVICE TokenResult<Real> finish(const TokenState<Real>& state, Real x, int32_t fallback,
                                          int64_t vocabulary) {
  const int64_t token = state.token < 0 ? fallback : state.token;
  if (!(state.sum > 0)) return {token, 0, 0, std::log(Real(vocabulary)), Real(-HUGE_VALF)};
  const Real log_sum = std::log(state.sum);
  const Real entropy = log_sum - state.weighted / state.sum;
  const bool counted = state.token >= 0 && x > Real(-HUGE_VALF);
  const Real prob = counted ? std::exp(x - state.max) / state.sum : Real(0);
  const Real margin = counted ? (1 - std::exp(state.second - state.max)) / state.sum : Real(0);
  return {token, prob, margin, entropy > 0 ? entropy : Real(0), state.max + log_sum};
}

}  // namespace dllm
