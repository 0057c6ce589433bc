// Cross entropy on CUDA: one CTA per row, an online softmax [Milakov & Gimelshein 2018] per thread, merged in
// one order. NaN and infinite logits show in the row's result, as they do in torch.
#pragma once

#include "cuda/cross_entropy/config.h"
#include "cuda/cross_entropy/launch.h"
#include "cuda/logits.cuh"

namespace dllm::cuda {

template <class Real>
struct OnlineSoftmax {
  Real max = -HUGE_VALF, sum = 0;

  // Finite when nothing but −inf was seen, so that exp(−inf − shift) is 0.
  __device__ Real shift() const { return max == -HUGE_VALF ? Real(0) : max; }

  __device__ void raise_max(Real to) {
    if (!(to > max)) return;
    const Real before = max;
    max = to;
    sum *= exponential(before - shift());
  }

  template <int n>
  __device__ void add(const Real (&x)[n]) {
    Real highest = x[0];
#pragma unroll
    for (int i = 1; i < n; i++) highest = fmax(highest, x[i]);
    raise_max(highest);
    const Real shift = this->shift();
#pragma unroll
    for (int i = 0; i < n; i++) sum += exponential(x[i] - shift);
  }

  __device__ Real log_sum_exp() const { return shift() + log(sum); }
};

// Every lane gets the softmax of all lanes.
template <class Real>
__device__ OnlineSoftmax<Real> merged_lanes(OnlineSoftmax<Real> softmax) {
  Real highest = softmax.max;
  for (int bit = 16; bit; bit /= 2) highest = fmax(highest, __shfl_xor_sync(kAllLanes, highest, bit));
  softmax.raise_max(highest);
  for (int bit = 16; bit; bit /= 2) softmax.sum += __shfl_xor_sync(kAllLanes, softmax.sum, bit);
  return softmax;
}

// Every thread gets the softmax of the CTA.
template <class Real>
__device__ OnlineSoftmax<Real> merged_threads(OnlineSoftmax<Real> softmax) {
  __shared__ OnlineSoftmax<Real> warps[kRowWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  softmax = merged_lanes(softmax);
  if (lane == 0) warps[warp] = softmax;
  __syncthreads();
  return merged_lanes(lane < kRowWarps ? warps[lane] : OnlineSoftmax<Real>());
}

template <class T, class Real>
struct CrossEntropyRow {
  static constexpr int kIds = RowVectors<T>::kIds;
  const CrossEntropyParams<ListedTokenIds>& p;
  int64_t row;
  T* logits;
  RowVectors<T> vectors;
  int64_t target;
  Real weight;

  __device__ CrossEntropyRow(const CrossEntropyParams<ListedTokenIds>& p, int64_t row)
      : p(p),
        row(row),
        logits(row_of<T>(p.logits, row)),
        vectors(logits, p.vocabulary),
        target(p.targets[row]),
        weight(static_cast<const Real*>(p.weights)[row]) {}

  __device__ Real target_logit() const {
    if (target < 0 || target >= p.vocabulary) return NAN;
    return listed(p.suppress, static_cast<int32_t>(target)) ? Real(-HUGE_VALF) : Real(widen(logits[target]));
  }

  __device__ void load(int32_t first, const uint4& raw, Real (&x)[kIds]) const {
    unpack<T>(raw, x);
    bar(p.suppress, first, x);
  }
  __device__ void load_edge(int32_t id, Real (&x)[1]) const {
    x[0] = widen(logits[id]);
    bar(p.suppress, id, x);
  }

  // keep(vector, raw) sees what is read.
  template <class Keep>
  __device__ OnlineSoftmax<Real> softmax(const Keep& keep) const {
    OnlineSoftmax<Real> softmax;
    for_each_vector<kRowLoads, kRowThreads>(logits, vectors, [&](int32_t vector, const uint4& raw) {
      Real x[kIds];
      load(vectors.first_id(vector), raw, x);
      keep(vector, raw);
      softmax.add(x);
    });
    if (threadIdx.x < vectors.edges) {
      Real x[1];
      load_edge(vectors.edge_id(threadIdx.x), x);
      softmax.add(x);
    }
    return merged_threads(softmax);
  }
};

// factor · exp(x − shift), except at the target.
template <class Real>
struct Gradient {
  Real factor, shift, at_target;
  int64_t target;

  template <class T, int n>
  __device__ void of(int32_t first, const Real (&x)[n], T (&grad)[n]) const {
#pragma unroll
    for (int i = 0; i < n; i++) grad[i] = T(factor * exponential(x[i] - shift));
    const int64_t at = target - first;
    if (at < 0 || at >= n) return;
#pragma unroll
    for (int i = 0; i < n; i++)
      if (i == at) grad[i] = T(at_target);
  }
};

template <class T>
__device__ void fill_zeros(T* row, int32_t vocabulary) {
  const RowVectors<T> vectors(row, vocabulary);
  for (int32_t v = threadIdx.x; v < vectors.count; v += kRowThreads) *vectors.at(row, v) = uint4{};
  if (threadIdx.x < vectors.edges) row[vectors.edge_id(threadIdx.x)] = T(0.0f);
}

template <class T, class Real>
__global__ void __launch_bounds__(kRowThreads)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyParams<ListedTokenIds> p) {
  const CrossEntropyRow<T, Real> row(p, blockIdx.x);
  Real ce = 0, logsumexp = 0;
  if (row.weight != 0) {
    const OnlineSoftmax<Real> softmax = row.softmax([](int32_t, const uint4&) {});
    ce = log(softmax.sum) + (softmax.shift() - row.target_logit());
    logsumexp = softmax.log_sum_exp();
  }
  if (threadIdx.x > 0) return;
  static_cast<Real*>(p.ce)[row.row] = ce;
  static_cast<Real*>(p.logsumexp)[row.row] = logsumexp;
}

template <class T, class Real>
__global__ void __launch_bounds__(kRowThreads)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyParams<ListedTokenIds> p) {
  const CrossEntropyRow<T, Real> row(p, blockIdx.x);
  T* grad = static_cast<T*>(p.grad) + row.row * p.vocabulary;
  if (row.weight == 0) return fill_zeros(grad, p.vocabulary);
  const RowVectors<T>& vectors = row.vectors;
  const bool same_alignment =
      reinterpret_cast<uintptr_t>(grad) % 16 == reinterpret_cast<uintptr_t>(row.logits) % 16;
  const Real logsumexp = static_cast<const Real*>(p.logsumexp)[row.row];
  const Real factor = *static_cast<const Real*>(p.grad_loss) * row.weight;
  const Gradient<Real> gradient{factor, logsumexp, factor * expm1(row.target_logit() - logsumexp),
                                row.target};
  for_each_vector<kRowLoads, kRowThreads>(row.logits, vectors, [&](int32_t vector, const uint4& raw) {
    const int32_t first = vectors.first_id(vector);
    Real x[row.kIds];
    T g[row.kIds];
    row.load(first, raw, x);
    gradient.of(first, x, g);
    if (same_alignment) {
      *vectors.at(grad, vector) = packed(g);
    } else {
#pragma unroll
      for (int i = 0; i < row.kIds; i++) grad[first + i] = g[i];
    }
  });
  if (threadIdx.x >= vectors.edges) return;
  const int32_t id = vectors.edge_id(threadIdx.x);
  Real x[1];
  T g[1];
  row.load_edge(id, x);
  gradient.of(id, x, g);
  grad[id] = g[0];
}

// The first `resident` vectors of the row stay in shared memory, each with the thread that read it.
template <class T, class Real>
__global__ void __launch_bounds__(kRowThreads, 1)
    cross_entropy_in_place_kernel(const __grid_constant__ CrossEntropyParams<ListedTokenIds> p,
                                  int32_t resident) {
  uint4* kept = dynamic_shared<uint4>();
  const CrossEntropyRow<T, Real> row(p, blockIdx.x);
  Real* ce = static_cast<Real*>(p.ce) + row.row;
  if (row.weight == 0) {
    if (threadIdx.x == 0) *ce = 0;
    return fill_zeros(row.logits, p.vocabulary);
  }
  const RowVectors<T>& vectors = row.vectors;
  const Real target_logit = row.target_logit();
  const OnlineSoftmax<Real> softmax = row.softmax([&](int32_t vector, const uint4& raw) {
    if (vector < resident) kept[vector] = raw;
  });
  // From here on all threads have read the target's logit, and logits may be overwritten.
  const Real log_probability = (target_logit - softmax.shift()) - log(softmax.sum);
  if (threadIdx.x == 0) *ce = -log_probability;
  const Gradient<Real> gradient{row.weight / softmax.sum, softmax.shift(),
                                row.weight * expm1(log_probability), row.target};
  for (int32_t v = threadIdx.x; v < vectors.count; v += kRowThreads) {
    const uint4 raw = v < resident ? kept[v] : *vectors.at(row.logits, v);
    Real x[row.kIds];
    T g[row.kIds];
    row.load(vectors.first_id(v), raw, x);
    gradient.of(vectors.first_id(v), x, g);
    *vectors.at(row.logits, v) = packed(g);
  }
  if (threadIdx.x >= vectors.edges) return;
  const int32_t id = vectors.edge_id(threadIdx.x);
  Real x[1];
  T g[1];
  row.load_edge(id, x);
  gradient.of(id, x, g);
  row.logits[id] = g[0];
}

// loss = Σ weight · ce, in double and in one order; one CTA.
template <class Real>
__global__ void __launch_bounds__(kSumThreads)
    weighted_sum_kernel(const __grid_constant__ CrossEntropyParams<ListedTokenIds> p) {
  __shared__ double warps[kSumThreads / 32];
  double sum = 0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kSumThreads) {
    const Real weight = static_cast<const Real*>(p.weights)[row];
    if (weight != 0) sum += double(weight) * static_cast<const Real*>(p.ce)[row];
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int delta = 16; delta; delta /= 2) sum += __shfl_down_sync(kAllLanes, sum, delta);
  if (lane == 0) warps[warp] = sum;
  __syncthreads();
  if (warp > 0) return;
  sum = warps[lane];
  for (int delta = 16; delta; delta /= 2) sum += __shfl_down_sync(kAllLanes, sum, delta);
  if (lane == 0) *static_cast<Real*>(p.loss) = static_cast<Real>(sum);
}

}  // namespace dllm::cuda
