// How kernels walk over rows of logits, 16 bytes at a time, and what they do with listed ids.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstring>

#include "core/params.h"
#include "cuda/ptx.cuh"
#include "cuda/widen.cuh"

namespace dllm::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// NaN becomes −inf, +inf the largest float, as on the CPU.
__device__ inline float tame(float x) { return fminf(fmaxf(x, -HUGE_VALF), FLT_MAX); }

__device__ inline float exponential(float x) { return fast_exp2(x * 1.44269504f); }
__device__ inline double exponential(double x) { return exp(x); }

template <class T>
__device__ T* row_of(const LogitsView& view, int32_t row) {
  return static_cast<T*>(view.data) + view.offset(row);
}

__device__ inline bool listed(const ListedTokenIds& list, int32_t id) {
  for (int i = 0; i < list.count; i++)
    if (list.ids[i] == id) return true;
  return false;
}

__device__ inline bool any_listed(const ListedTokenIds& list, int32_t begin, int32_t end) {
  for (int i = 0; i < list.count; i++)
    if (list.ids[i] >= begin && list.ids[i] < end) return true;
  return false;
}

// Bars the listed ones of ids first, first + 1, …
template <class Real, int n>
__device__ void bar(const ListedTokenIds& list, int32_t first, Real (&x)[n]) {
  for (int i = 0; i < list.count; i++) {
    const int32_t at = list.ids[i] - first;
    if (at < 0 || at >= n) continue;
#pragma unroll
    for (int j = 0; j < n; j++)
      if (j == at) x[j] = -HUGE_VALF;
  }
}

// A row as aligned vectors of 16 bytes and, before and after them, `edges` ids: fewer than 32, one for each
// of as many threads.
template <class T>
struct RowVectors {
  static constexpr int kIds = 16 / sizeof(T);
  int32_t head, count, edges;

  __device__ RowVectors(const T* row, int32_t vocabulary) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    head = min(past ? kIds - past : 0, vocabulary);
    count = (vocabulary - head) / kIds;
    edges = vocabulary - count * kIds;
  }
  __device__ int32_t first_id(int32_t vector) const { return head + vector * kIds; }
  __device__ int32_t edge_id(int32_t edge) const { return edge < head ? edge : edge + count * kIds; }
  __device__ uint4* at(T* row, int32_t vector) const { return reinterpret_cast<uint4*>(row + head) + vector; }
  __device__ const uint4* at(const T* row, int32_t vector) const {
    return reinterpret_cast<const uint4*>(row + head) + vector;
  }
};

template <class T, class Real>
__device__ void unpack(const uint4& raw, Real (&x)[16 / sizeof(T)]) {
  T value[16 / sizeof(T)];
  memcpy(value, &raw, sizeof raw);
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); i++) x[i] = widen(value[i]);
}

template <class T>
__device__ uint4 packed(const T (&x)[16 / sizeof(T)]) {
  uint4 raw;
  memcpy(&raw, x, sizeof raw);
  return raw;
}

// visit(vector, raw) for the vectors of this thread, `kLoads` of them in flight.
template <int kLoads, int kThreads, class T, class Visit>
__device__ void for_each_vector(const T* row, const RowVectors<T>& vectors, const Visit& visit) {
  for (int32_t base = threadIdx.x; base < vectors.count; base += kLoads * kThreads) {
    uint4 raw[kLoads];
#pragma unroll
    for (int load = 0; load < kLoads; load++)
      if (base + load * kThreads < vectors.count) raw[load] = *vectors.at(row, base + load * kThreads);
#pragma unroll
    for (int load = 0; load < kLoads; load++)
      if (base + load * kThreads < vectors.count) visit(base + load * kThreads, raw[load]);
  }
}

}  // namespace dllm::cuda
