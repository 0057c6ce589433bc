// A wgmma operand in shared memory: rows of a [batch, heads, positions, head_dim] tensor as panels.
#pragma once

#include "cuda/sm90/ptx.cuh"

namespace dllm::cuda::sm90 {

template <int kDim, int kRows>
struct OperandTile {
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kPanelBytes = panel_bytes(kRows);
  static constexpr int kBytes = kPanels * kPanelBytes;

  unsigned char* data;

  // kRows rows from position `first` on, zeros where there are none; by one thread. `barrier` expects kBytes.
  __device__ void load(const TensorMap& map, Mbarrier& barrier, int batch, int head, int first) const {
    for (int panel = 0; panel < kPanels; panel++)
      cp_async_bulk_tensor(data + panel * kPanelBytes, map, barrier, panel * kPanelColumns, first, head,
                           batch);
  }

  // Zeros in rows whose bit in keep[row / 64] is not set; by all lanes of a warp.
  __device__ void clear(const uint64_t (&keep)[(kRows + 63) / 64]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int word = 0; word < (kRows + 63) / 64; word++) {
      if (keep[word] == ~uint64_t{0}) continue;
#pragma unroll 1
      for (int i = lane / 8; i < min(kRows, 64); i += 4) {
        if (keep[word] >> i & 1) continue;
        unsigned char* row = data + (64 * word + i) * kPanelRowBytes + lane % 8 * 16;
        for (int panel = 0; panel < kPanels; panel++)
          *reinterpret_cast<uint4*>(row + panel * kPanelBytes) = uint4{0, 0, 0, 0};
      }
    }
  }

  // Of the product that takes columns 16·step to 16·step + 15 of rows from `row` on, which a result has one
  // each of.
  __device__ uint64_t k_major(int row, int step) const {
    return k_major_step(k_major_descriptor(shared_address(data) + row * kPanelRowBytes), step, kPanelBytes);
  }
  // Of the product that sums over rows 16·step to 16·step + 15.
  __device__ uint64_t mn_major(int step) const {
    return mn_major_step(mn_major_descriptor(shared_address(data), kPanelBytes), step);
  }
};

// The bits of all lanes together.
__device__ inline uint64_t warp_or(uint64_t bits) {
  return static_cast<uint64_t>(__reduce_or_sync(~0u, static_cast<unsigned>(bits >> 32))) << 32 |
         __reduce_or_sync(~0u, static_cast<unsigned>(bits));
}

}  // namespace dllm::cuda::sm90
