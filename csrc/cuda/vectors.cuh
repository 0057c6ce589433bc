// Neighbouring values of a row as float32, 16 bytes to an access where they lie so.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/widen.cuh"

namespace dllm::cuda {

template <int n, class T>
struct alignas(n * sizeof(T)) Vector {
  T values[n];
};

template <int n, class T>
__device__ void load_values(float (&to)[n], const T* from) {
  const auto vector = *reinterpret_cast<const Vector<n, T>*>(from);
#pragma unroll
  for (int i = 0; i < n; i++) to[i] = widen(vector.values[i]);
}

template <int n, class T>
__device__ void store_values(T* to, const float (&from)[n]) {
  Vector<n, T> vector;
#pragma unroll
  for (int i = 0; i < n; i++) vector.values[i] = T(from[i]);
  *reinterpret_cast<Vector<n, T>*>(to) = vector;
}

template <class T>
__device__ float rounded(float x) {
  return widen(T(x));
}

// Whether rows of `width` values can be read 16 bytes at a time.
template <class T>
bool in_vectors(int64_t width) {
  return width % (16 / sizeof(T)) == 0;
}
template <class T>
bool in_vectors(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}
template <class T>
bool in_vectors(const void* data, const RowsLayout& layout) {
  return in_vectors<T>(data) && in_vectors<T>(layout.outer_stride) && in_vectors<T>(layout.inner_stride);
}

template <class T>
bool in_vectors(const void* data, const HeadsLayout& layout) {
  return in_vectors<T>(data) && in_vectors<T>(layout.batch_stride) && in_vectors<T>(layout.head_stride) &&
         in_vectors<T>(layout.position_stride);
}

// visit(T()) with the storage type.
template <class Visit>
auto with_type(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::bfloat16: return visit(__nv_bfloat16());
    case DType::float16: return visit(__half());
    default: return visit(float());
  }
}

// visit(n) with the values of an access as a constant.
template <class T, class Visit>
auto with_vectors(bool in_vectors, const Visit& visit) {
  return in_vectors ? visit(std::integral_constant<int, 16 / sizeof(T)>())
                    : visit(std::integral_constant<int, 1>());
}

}  // namespace dllm::cuda
