// Shadow of csrc/cuda/ptx.cuh: the same wrappers, by the layouts documented there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace dllm::cuda {

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared());
}

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  simt::Site site = simt::Site::current()) {
  simt::mma_m16n8k16(d, a, b, std::is_same_v<T, __nv_bfloat16>, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::current()) {
  simt::ldmatrix_x4(r, row, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::current()) {
  simt::ldmatrix_x4(r, row, true, site);
}

inline void cp_async(void* shared, const void* global, bool valid = true,
                     simt::Site site = simt::Site::current()) {
  simt::cp_async(shared, valid ? global : nullptr, site);
}
inline void cp_async_commit_group() { simt::cp_async_commit_group(); }
template <int pending>
void cp_async_wait_group() {
  simt::cp_async_wait_group(pending);
}

inline void bar_sync(int id, int threads, simt::Site site = simt::Site::current()) {
  simt::barrier("bar_sync", id, threads, true, false, site);
}
inline void bar_arrive(int id, int threads, simt::Site site = simt::Site::current()) {
  simt::barrier("bar_arrive", id, threads, false, false, site);
}

inline void griddepcontrol_wait() { simt::griddepcontrol_wait(); }
inline void griddepcontrol_launch_dependents() {}

template <class T>
uint32_t pack(float low, float high) {
  const T pair[2] = {T(low), T(high)};
  return std::bit_cast<uint32_t>(pair);
}

// ex2.approx.ftz: subnormal arguments and results are zero.
inline float fast_exp2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace dllm::cuda
