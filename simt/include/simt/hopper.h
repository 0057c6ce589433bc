// What the shadow of cuda/sm90/ptx.cuh asks of the emulator: transaction barriers, bulk copies, warpgroup
// products.
#pragma once

#include <cuda.h>

#include "simt/device.h"

namespace simt {

// ---- transaction barriers: `barrier` is their 8 bytes in shared memory
void init_transaction_barrier(void* barrier, int arrivals, Site site);
void publish_transaction_barriers();
void arrive_expecting(void* barrier, uint32_t bytes, Site site);
void wait_for_phase(void* barrier, unsigned parity, Site site);

// ---- what ordinary stores and asynchronous reads see of each other
void fence_asynchronous_reads();

// ---- bulk copies
void load_box(void* shared, const CUtensorMap& map, void* barrier, const int* coordinates, int rank,
              Site site);

// ---- registers of a thread, divided anew
void give_registers(int count, Site site);
void take_registers(int count, Site site);

// ---- products of a warpgroup
struct Operand {
  const uint32_t* registers;  // four of each lane, or null: in shared memory
  uint64_t descriptor;
  bool mn_major;
};
// `registers`, `sizes` in bytes: what the products may use that other instructions wrote.
void begin_products(const void* const* registers, const size_t* sizes, int count);
void multiply(float* d, int tiles, bool bfloat16, Operand a, Operand b, bool add, Site site);
void commit_products(Site site);
void wait_products(int pending, Site site);

}  // namespace simt
