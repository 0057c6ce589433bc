// Shadow of csrc/cuda/sm90/ptx.cuh: the same wrappers, by the layouts documented there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.cuh"
#include "cuda/sm90/matrix_descriptor.h"
#include "cuda/sm90/tensor_map.h"
#include "simt/hopper.h"

namespace dllm::cuda {

#define SIMT_SITE simt::Site site = simt::Site::current()

inline unsigned char* panel_shared() {
  unsigned char* base = dynamic_shared<unsigned char>();
  return base + (0u - shared_address(base)) % kPanelAlignment;
}

// ---- mbarrier
struct alignas(8) Mbarrier {
  uint64_t state;
};

inline void mbarrier_init(Mbarrier& barrier, int arrivals, SIMT_SITE) {
  simt::mbarrier_init(&barrier, arrivals, site);
}
inline void fence_mbarrier_init() { simt::fence_mbarrier_init(); }
inline void mbarrier_arrive(Mbarrier& barrier, SIMT_SITE) {
  simt::mbarrier_arrive_expect_tx(&barrier, 0, site);
}
inline void mbarrier_arrive_expect_tx(Mbarrier& barrier, uint32_t bytes, SIMT_SITE) {
  simt::mbarrier_arrive_expect_tx(&barrier, bytes, site);
}
inline void mbarrier_wait_parity(Mbarrier& barrier, uint32_t parity, SIMT_SITE) {
  simt::mbarrier_wait_parity(&barrier, parity, site);
}
inline void fence_proxy_async() { simt::fence_proxy_async(); }

// ---- TMA
inline void cp_async_bulk_tensor(void* shared, const TensorMap& map, Mbarrier& barrier, int x, int y,
                                 SIMT_SITE) {
  const int coordinates[] = {x, y};
  simt::cp_async_bulk_tensor(shared, map, &barrier, coordinates, 2, site);
}
inline void cp_async_bulk_tensor(void* shared, const TensorMap& map, Mbarrier& barrier, int x, int y, int z,
                                 int w, SIMT_SITE) {
  const int coordinates[] = {x, y, z, w};
  simt::cp_async_bulk_tensor(shared, map, &barrier, coordinates, 4, site);
}
inline void cp_async_bulk_prefetch_tensor(const TensorMap& map, int, int, SIMT_SITE) {
  simt::check_prefetch(map, 2, site);
}

// ---- setmaxnreg
template <int kRegisters>
void setmaxnreg_inc(SIMT_SITE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 240);
  simt::setmaxnreg_inc(kRegisters, site);
}
template <int kRegisters>
void setmaxnreg_dec(SIMT_SITE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 240);
  simt::setmaxnreg_dec(kRegisters, site);
}

// ---- wgmma
template <class... Operands>
void wgmma_fence(Operands&... operands) {
  const void* registers[] = {&operands..., nullptr};
  const size_t sizes[] = {sizeof operands..., 0};
  simt::wgmma_fence(registers, sizes, sizeof...(operands));
}
inline void wgmma_commit_group(SIMT_SITE) { simt::wgmma_commit_group(site); }
template <int pending, class... Sums>
void wgmma_wait_group(Sums&...) {
  simt::wgmma_wait_group(pending, simt::Site::current());
}

template <class T, Major a_major, Major b_major, int kTiles>
void wgmma_mma_async(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add, SIMT_SITE) {
  static_assert(kTiles == 1 || kTiles == 2 || kTiles == 4 || kTiles == 8 || kTiles == 16);
  simt::wgmma_mma_async(d[0], kTiles, std::is_same_v<T, __nv_bfloat16>, {nullptr, a, a_major == Major::mn},
                        {nullptr, b, b_major == Major::mn}, add, site);
}
template <class T, Major b_major, int kTiles>
void wgmma_mma_async(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add, SIMT_SITE) {
  static_assert(kTiles == 1 || kTiles == 2 || kTiles == 4 || kTiles == 8 || kTiles == 16);
  simt::wgmma_mma_async(d[0], kTiles, std::is_same_v<T, __nv_bfloat16>, {a, 0, false},
                        {nullptr, b, b_major == Major::mn}, add, site);
}

#undef SIMT_SITE

}  // namespace dllm::cuda
