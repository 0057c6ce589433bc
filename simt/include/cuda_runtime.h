// Shadow of the CUDA runtime: kernels compile as host C++, a thread of a CTA is a fiber of the emulator.
#pragma once

#include <cuda_runtime_api.h>

#include "simt/arithmetic.h"
#include "simt/atomics.h"
#include "simt/device.h"
#include "simt/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static
// One CTA runs at a time, on one thread of the machine: this library's thread-local storage is its memory.
#define __shared__ static thread_local

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
extern dim3 gridDim, blockDim;
constexpr int warpSize = 32;

// ---- barriers of the CTA
inline void __syncthreads(simt::Site site = simt::Site::current()) {
  simt::barrier("__syncthreads", 0, 0, true, false, site);
}
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::current()) {
  return simt::barrier("__syncthreads_count", 0, 0, true, predicate, site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::current()) {
  return simt::barrier("__syncthreads_or", 0, 0, true, predicate, site) > 0;
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::current()) {
  return simt::barrier("__syncthreads_and", 0, 0, true, !predicate, site) == 0;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// ---- addresses, cached loads and stores
inline size_t __cvta_generic_to_shared(const void* pointer) { return simt::shared_offset(pointer); }
inline void* __cvta_shared_to_generic(size_t offset) { return simt::shared_pointer(offset); }

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldca(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldlu(const T* from) {
  return *from;
}
template <class T>
T __ldcv(const T* from) {
  return *from;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
void __stwb(T* to, T value) {
  *to = value;
}
template <class T>
void __stwt(T* to, T value) {
  *to = value;
}

[[noreturn]] inline void __trap(simt::Site site = simt::Site::current()) { simt::fail("__trap", site); }
inline void __nanosleep(unsigned) {}
