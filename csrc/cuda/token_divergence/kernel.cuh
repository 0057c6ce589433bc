// token_divergence on CUDA, one CTA per row, one pass over both rows: with e = exp(x − max x), x of p and y
// of q, KL = Σ e·(x − y) / Σ e − logsumexp x + logsumexp y. Exponentials are Real; what is summed over a row
// is double, because the terms of a small divergence nearly cancel.
#pragma once

#include "cuda/logits.cuh"
#include "cuda/token_divergence/config.h"
#include "cuda/token_divergence/launch.h"

namespace dllm::cuda {

struct DivergenceState {
  double max_x = -HUGE_VAL, sum_x = 0, cross = 0;  // cross: Σ e·(x − y)
  double max_y = -HUGE_VAL, sum_y = 0;

  static __device__ double shift(double max) { return max > -HUGE_VAL ? max : 0; }

  __device__ void raise_maxima(double x, double y) {
    if (x > max_x) {
      const double scale = exp(max_x - x);
      max_x = x;
      sum_x *= scale;
      cross = scale > 0 ? cross * scale : 0;  // an infinite product with weight 0 counts nothing
    }
    if (y > max_y) {
      sum_y *= exp(max_y - y);
      max_y = y;
    }
  }

  template <class Real, int n>
  __device__ void add(const float (&x)[n], const float (&y)[n]) {
    float highest_x = x[0], highest_y = y[0];
#pragma unroll
    for (int i = 1; i < n; i++) highest_x = fmaxf(highest_x, x[i]), highest_y = fmaxf(highest_y, y[i]);
    raise_maxima(highest_x, highest_y);
    const Real shift_x = shift(max_x), shift_y = shift(max_y);
    Real sums[3] = {};
#pragma unroll
    for (int i = 0; i < n; i++) {
      const Real e = exponential(x[i] - shift_x);
      sums[0] += e;
      sums[1] += exponential(y[i] - shift_y);
      sums[2] += e > 0 ? e * (static_cast<Real>(x[i]) - y[i]) : Real(0);
    }
    sum_x += sums[0], sum_y += sums[1], cross += sums[2];
  }

  __device__ void merge(DivergenceState other) {
    raise_maxima(other.max_x, other.max_y);
    other.raise_maxima(max_x, max_y);
    sum_x += other.sum_x, sum_y += other.sum_y, cross += other.cross;
  }

  // Infinite where q is 0 and p is not, and where a row has no finite logit.
  __device__ double value() const {
    if (!(sum_x > 0 && sum_y > 0)) return HUGE_VAL;
    const double divergence = cross / sum_x - (max_x + log(sum_x)) + (max_y + log(sum_y));
    return divergence > 0 ? divergence : 0;
  }
};

// Lane 0 gets the state of all lanes.
__device__ inline void merge_lanes(DivergenceState& state) {
  for (int delta = 16; delta; delta /= 2) {
    DivergenceState other;
    other.max_x = __shfl_down_sync(kAllLanes, state.max_x, delta);
    other.sum_x = __shfl_down_sync(kAllLanes, state.sum_x, delta);
    other.cross = __shfl_down_sync(kAllLanes, state.cross, delta);
    other.max_y = __shfl_down_sync(kAllLanes, state.max_y, delta);
    other.sum_y = __shfl_down_sync(kAllLanes, state.sum_y, delta);
    state.merge(other);
  }
}

template <class T, class Real>
__global__ void __launch_bounds__(kDivergenceThreads, 1)
    token_divergence_kernel(const __grid_constant__ TokenDivergenceParams<ListedTokenIds> p) {
  constexpr int kIds = RowVectors<T>::kIds;
  __shared__ double fields[5][kDivergenceWarps];
  const T *logits = row_of<const T>(p.logits, blockIdx.x),
          *previous = row_of<const T>(p.previous, blockIdx.x);
  const RowVectors<T> vectors(logits, p.vocabulary);
  const bool same_alignment =
      reinterpret_cast<uintptr_t>(logits) % 16 == reinterpret_cast<uintptr_t>(previous) % 16;
  DivergenceState state;
  const auto add = [&]<int n>(int32_t first, float (&x)[n], float (&y)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) {
      x[i] = tame(tame(x[i]) * p.confidence_scale);
      y[i] = tame(tame(y[i]) * p.confidence_scale);
    }
    bar(p.suppress, first, x), bar(p.suppress, first, y);
    bar(p.confidence_exclude, first, x), bar(p.confidence_exclude, first, y);
    state.add<Real>(x, y);
  };
  for_each_vector<2, kDivergenceThreads>(logits, vectors, [&](int32_t vector, const uint4& raw) {
    const int32_t first = vectors.first_id(vector);
    float x[kIds], y[kIds];
    unpack<T>(raw, x);
    if (same_alignment) {
      unpack<T>(*vectors.at(previous, vector), y);
    } else {
#pragma unroll
      for (int i = 0; i < kIds; i++) y[i] = widen(previous[first + i]);
    }
    add(first, x, y);
  });
  if (threadIdx.x < vectors.edges) {
    const int32_t id = vectors.edge_id(threadIdx.x);
    float x[1] = {widen(logits[id])}, y[1] = {widen(previous[id])};
    add(id, x, y);
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  merge_lanes(state);
  if (lane == 0) {
    fields[0][warp] = state.max_x, fields[1][warp] = state.sum_x, fields[2][warp] = state.cross;
    fields[3][warp] = state.max_y, fields[4][warp] = state.sum_y;
  }
  __syncthreads();
  if (warp > 0) return;
  state = DivergenceState();
  if (lane < kDivergenceWarps)
    state = {fields[0][lane], fields[1][lane], fields[2][lane], fields[3][lane], fields[4][lane]};
  merge_lanes(state);
  if (lane == 0) static_cast<Real*>(p.divergence)[blockIdx.x] = static_cast<Real>(state.value());
}

}  // namespace dllm::cuda
