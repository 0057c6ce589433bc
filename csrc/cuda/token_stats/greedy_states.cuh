// The states of rows at temperature 0 with nothing excluded and confidence temperature 1, where the score is
// the confidence logit. A range of ids stays in registers: its maximum is known before the first exponential,
// and only threads that hold it look for the token and the second highest. What is done for every logit
// decides how fast rows are read: it is kept to a conversion, half a maximum, and five instructions of the
// sums.
#pragma once

#include "cuda/token_stats/row_state.cuh"

namespace dllm::cuda {

// The highest of one load; NaN never wins beside a number.
__device__ inline float highest_of(const uint4& raw, float) {
  float x[4];
  unpack<float>(raw, x);
  return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
}
__device__ inline float highest_of(const uint4& raw, __nv_bfloat16) {
  __nv_bfloat162 x[4];
  memcpy(x, &raw, sizeof x);
  const __nv_bfloat162 pair = __hmax2(__hmax2(x[0], x[1]), __hmax2(x[2], x[3]));
  return fmaxf(__low2float(pair), __high2float(pair));
}
__device__ inline float highest_of(const uint4& raw, __half) {
  __half2 x[4];
  memcpy(x, &raw, sizeof x);
  const __half2 pair = __hmax2(__hmax2(x[0], x[1]), __hmax2(x[2], x[3]));
  return fmaxf(__low2float(pair), __high2float(pair));
}

// Adds loads to the sums of `state`, whose maximum is final.
template <class T, int n>
__device__ void add_exponentials(TokenState<float>& state, const uint4 (&raw)[n]) {
  // x·log₂e − max·log₂e in one instruction; how far the second product was rounded is made good at the end.
  // The bound makes −inf and NaN vanish beside the maximum.
  constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f, kLowest = -126.0f;
  const float scaled_max = state.max * kLog2e, rounding = fmaf(state.max, kLog2e, -scaled_max);
#pragma unroll
  for (int load = 0; load < n; load++) {
    float x[16 / sizeof(T)];
    unpack<T>(raw[load], x);
#pragma unroll
    for (const float logit : x) {
      const float power = fmaxf(fmaf(logit, kLog2e, -scaled_max), kLowest), e = fast_exp2(power);
      state.sum += e;
      state.weighted += e * power;
    }
  }
  const float correction = fast_exp2(-rounding);
  state.weighted = (state.weighted - rounding * state.sum) * correction * kLn2;
  state.sum *= correction;
}

// The same where that product would be rounded too far, or overflow.
template <class T, int n>
__device__ void add_large_exponentials(TokenState<float>& state, const uint4 (&raw)[n]) {
#pragma unroll
  for (int load = 0; load < n; load++) {
    float x[16 / sizeof(T)];
    unpack<T>(raw[load], x);
#pragma unroll
    for (const float logit : x) {
      const float shifted = fmaxf(tame(logit) - state.max, -87.0f), e = exponential(shifted);
      state.sum += e;
      state.weighted += e * shifted;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kStatsThreads, sizeof(T) == 2 ? 3 : 2)
    greedy_token_states_kernel(const __grid_constant__ RowStatsParams p) {
  constexpr int kIds = 16 / sizeof(T), kLoads = kStatsRange / (kStatsThreads * kIds);
  __shared__ float warp_highest[kStatsWarps];
  __shared__ TokenState<float> warp_states[kStatsWarps];
  const int32_t row = row_of_cta();
  if (row < 0 || row >= p.rows || !row_identity(p, row).masked) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t begin = blockIdx.x * kStatsRange;
  const int32_t end = min(static_cast<int64_t>(p.vocabulary), static_cast<int64_t>(begin) + kStatsRange);
  const T* logits = row_of<const T>(p.logits, row);
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  const auto first_id = [&](int load) {
    return begin + (load * kStatsThreads + static_cast<int>(threadIdx.x)) * kIds;
  };

  uint4 raw[kLoads];
#pragma unroll
  for (int load = 0; load < kLoads; load++) raw[load] = load_ids(logits, first_id(load), end, aligned);
  if (any_listed(p.suppress, begin, end)) {
#pragma unroll
    for (int load = 0; load < kLoads; load++) {
      T value[kIds];
      memcpy(value, &raw[load], sizeof value);
      bar(p.suppress, first_id(load), value);
      raw[load] = packed(value);
    }
  }

  float own_max = -HUGE_VALF;  // NaN never wins
#pragma unroll
  for (int load = 0; load < kLoads; load++) own_max = fmaxf(own_max, highest_of(raw[load], T()));
  const float warp_highest_x = warp_max(own_max);
  if (lane == 0) warp_highest[warp] = warp_highest_x;
  __syncthreads();
  const float highest = warp_max(warp_highest[lane % kStatsWarps]), max = fminf(highest, FLT_MAX);

  TokenState<float> state;
  if (highest > -HUGE_VALF) {
    state.max = state.score = max;
    state.second = own_max;
    if (fabsf(highest) < 65536.0f) add_exponentials<T>(state, raw);
    else add_large_exponentials<T>(state, raw);
    if (own_max == highest) {
      state.second = -HUGE_VALF;
#pragma unroll
      for (int load = 0; load < kLoads; load++) {
        float x[kIds];
        unpack<T>(raw[load], x);
#pragma unroll
        for (int i = 0; i < kIds; i++) {
          const bool found = x[i] == highest && state.token < 0;
          state.token = found ? first_id(load) + i : state.token;
          state.second = fmaxf(state.second, found ? -HUGE_VALF : x[i]);
        }
      }
    }
  }
  const bool shared_maximum = __syncthreads_count(own_max == highest) > 1;

  const auto token = __reduce_min_sync(kAllLanes, static_cast<unsigned>(state.token));
  const float second = warp_max(state.second), sum = warp_sum(state.sum), weighted = warp_sum(state.weighted);
  if (lane == 0)
    warp_states[warp] = {state.score, static_cast<int32_t>(token), state.max, second, sum, weighted};
  __syncthreads();
  if (warp > 0) return;
  const TokenState<float> other = lane < kStatsWarps ? warp_states[lane] : TokenState<float>();
  state.token = static_cast<int32_t>(__reduce_min_sync(kAllLanes, static_cast<unsigned>(other.token)));
  state.second = fminf(shared_maximum ? max : warp_max(other.second), FLT_MAX);
  state.sum = warp_sum(other.sum);
  state.weighted = warp_sum(other.weighted);
  if (lane == 0)
    static_cast<TokenState<float>*>(p.states)[static_cast<int64_t>(row) * gridDim.x + blockIdx.x] = state;
}

}  // namespace dllm::cuda
