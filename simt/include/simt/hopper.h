// What the shadow of cuda/sm90/ptx.cuh asks of the emulator: mbarrier, TMA, setmaxnreg, wgmma.
#pragma once

#include <cuda.h>

#include "simt/device.h"

namespace simt {

// ---- mbarrier: `barrier` is their 8 bytes in shared memory
void mbarrier_init(void* barrier, int arrivals, Site site);
void fence_mbarrier_init();
void mbarrier_arrive_expect_tx(void* barrier, uint32_t bytes, Site site);
void mbarrier_wait_parity(void* barrier, unsigned parity, Site site);

// ---- what ordinary stores and asynchronous reads see of each other
void fence_proxy_async();

// ---- TMA
void cp_async_bulk_tensor(void* shared, const CUtensorMap& map, void* barrier, const int* coordinates,
                          int rank, Site site);
// A prefetch does nothing here, if the tensor map has this rank.
void check_prefetch(const CUtensorMap& map, int rank, Site site);

// ---- setmaxnreg
void setmaxnreg_dec(int count, Site site);
void setmaxnreg_inc(int count, Site site);

// ---- wgmma
struct Operand {
  const uint32_t* registers;  // four of each lane, or null: in shared memory
  uint64_t descriptor;
  bool mn_major;
};
// `registers`, `sizes` in bytes: what the products may use that other instructions wrote.
void wgmma_fence(const void* const* registers, const size_t* sizes, int count);
void wgmma_mma_async(float* d, int tiles, bool bfloat16, Operand a, Operand b, bool add, Site site);
void wgmma_commit_group(Site site);
void wgmma_wait_group(int pending, Site site);

}  // namespace simt
