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

// ---- transaction barriers
struct alignas(8) TransactionBarrier {
  uint64_t state;
};

inline void init_barrier(TransactionBarrier& barrier, int arrivals, SIMT_SITE) {
  simt::init_transaction_barrier(&barrier, arrivals, site);
}
inline void publish_barriers() { simt::publish_transaction_barriers(); }
inline void arrive(TransactionBarrier& barrier, SIMT_SITE) { simt::arrive_expecting(&barrier, 0, site); }
inline void arrive_expecting(TransactionBarrier& barrier, uint32_t bytes, SIMT_SITE) {
  simt::arrive_expecting(&barrier, bytes, site);
}
inline void wait(TransactionBarrier& barrier, uint32_t parity, SIMT_SITE) {
  simt::wait_for_phase(&barrier, parity, site);
}
inline void fence_async_proxy() { simt::fence_asynchronous_reads(); }

// ---- bulk tensor copies
inline void load_box(void* shared, const TensorMap& map, TransactionBarrier& barrier, int x, int y,
                     SIMT_SITE) {
  const int coordinates[] = {x, y};
  simt::load_box(shared, map, &barrier, coordinates, 2, site);
}
inline void load_box(void* shared, const TensorMap& map, TransactionBarrier& barrier, int x, int y, int z,
                     int w, SIMT_SITE) {
  const int coordinates[] = {x, y, z, w};
  simt::load_box(shared, map, &barrier, coordinates, 4, site);
}

// ---- registers
template <int kRegisters>
void take_registers(SIMT_SITE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 240);
  simt::take_registers(kRegisters, site);
}
template <int kRegisters>
void give_registers(SIMT_SITE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 240);
  simt::give_registers(kRegisters, site);
}

// ---- matrix products of a warpgroup
template <class... Operands>
void begin_products(Operands&... operands) {
  const void* registers[] = {&operands..., nullptr};
  const size_t sizes[] = {sizeof operands..., 0};
  simt::begin_products(registers, sizes, sizeof...(operands));
}
inline void commit_products(SIMT_SITE) { simt::commit_products(site); }
template <int pending, class... Sums>
void wait_products(Sums&...) {
  simt::wait_products(pending, simt::Site::current());
}

template <class T, Major a_major, Major b_major, int kTiles>
void multiply(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add, SIMT_SITE) {
  static_assert(kTiles == 1 || kTiles == 2 || kTiles == 4 || kTiles == 8 || kTiles == 16);
  simt::multiply(d[0], kTiles, std::is_same_v<T, __nv_bfloat16>, {nullptr, a, a_major == Major::mn},
                 {nullptr, b, b_major == Major::mn}, add, site);
}
template <class T, Major b_major, int kTiles>
void multiply(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add, SIMT_SITE) {
  static_assert(kTiles == 8 || kTiles == 16);
  simt::multiply(d[0], kTiles, std::is_same_v<T, __nv_bfloat16>, {a, 0, false},
                 {nullptr, b, b_major == Major::mn}, add, site);
}

#undef SIMT_SITE

}  // namespace dllm::cuda
