// How the warpgroups of a kernel hand tiles to each other through a ring of buffers.
#pragma once

#include "cuda/sm90/ptx.cuh"

namespace dllm::cuda::sm90 {

// Where in a ring of buffers a warp is, and the parity of the phase it waits for there.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// `full`: the copy has landed. `empty`: all consumers are through with it; at first buffers are empty, which
// is what waiting for the parity of a phase before the first says.
struct BufferBarriers {
  Mbarrier full, empty;

  __device__ void init(int consumer_warps) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, consumer_warps);
  }
  __device__ void wait_full(uint32_t parity) { mbarrier_wait_parity(full, parity); }
  __device__ void wait_empty(uint32_t parity) { mbarrier_wait_parity(empty, parity ^ 1); }
  // Called by a warp of the consumers.
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
  }
};

}  // namespace dllm::cuda::sm90
