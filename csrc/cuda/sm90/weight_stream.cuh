// The main loop of Hopper kernels that stream a weight [outputs, inputs] past few rows of x [rows, inputs].
// One thread fetches both through a ring of buffers, two warpgroups multiply: rows of the weight are the left
// operand, so that few rows of x cost little. Every kRows sums along the inputs in the same order: a row's
// sums do not depend on the rows beside it.
#pragma once

#include "cuda/sm90/tile_ring.cuh"
#include "cuda/sm90/weight_stream.h"

namespace dllm::cuda::sm90 {

// A tile of outputs times a range of steps along the inputs, each a panel of the weight.
struct StreamedTile {
  int32_t first, end;  // outputs; those from `end` on, up to a tile's size, are left out
  int32_t first_step, steps;
};

template <class T, int kRows, class Tiles>
struct WeightStream {
  using Ring = RingPosition<Tiles::kStages>;
  struct Shared {
    BufferBarriers buffers[Tiles::kStages];

    // Called by all threads of the CTA.
    __device__ void init() {
      if (threadIdx.x == 0) {
        for (BufferBarriers& buffer : buffers) buffer.init(Tiles::kConsumerWarps);
        fence_mbarrier_init();
      }
      __syncthreads();
    }
  };

  const TensorMap& weight_map;  // boxes of a unit's panel
  const TensorMap& x_map;       // boxes of kRows
  Shared& shared;
  unsigned char* buffers;  // units of the weight, then rows of x
  int32_t first_row;       // of x

  __device__ unsigned char* weight(int stage, int unit) const {
    return buffers + stage * Tiles::kBufferBytes + unit * Tiles::kUnitBytes;
  }
  __device__ unsigned char* x(int stage) const { return weight(stage, Tiles::kConsumers); }
  __device__ static int units(const StreamedTile& tile) {
    return tile.first + Tiles::kUnit < tile.end ? 2 : 1;
  }

  // ---- the thread that fetches
  __device__ void load_tile(const StreamedTile& tile, Ring& ring) const {
    for (int step = tile.first_step; step < tile.first_step + tile.steps; step++) {
      BufferBarriers& buffer = shared.buffers[ring.stage];
      buffer.wait_empty(ring.parity);
      mbarrier_arrive_expect_tx(buffer.full, units(tile) * Tiles::kUnitBytes + Tiles::kRowsBytes);
      for (int unit = 0; unit < units(tile); unit++)
        cp_async_bulk_tensor(weight(ring.stage, unit), weight_map, buffer.full, step * kPanelColumns,
                             tile.first + unit * Tiles::kUnit);
      for (int panel = 0; panel < Tiles::kXPanels; panel++)
        cp_async_bulk_tensor(x(ring.stage) + panel * Tiles::kXPanelBytes, x_map, buffer.full,
                             (step * Tiles::kXPanels + panel) * kPanelColumns, first_row);
      ring.advance();
    }
  }
  // As much of the weight of a tile as the ring holds, into the L2 cache: also where a kernel before this one
  // may still write it.
  __device__ void prefetch_tile(const StreamedTile& tile) const {
    for (int step = 0; step < min(tile.steps, Tiles::kStages); step++)
      for (int unit = 0; unit < units(tile); unit++)
        cp_async_bulk_prefetch_tensor(weight_map, (tile.first_step + step) * kPanelColumns,
                                      tile.first + unit * Tiles::kUnit);
  }

  // ---- the warpgroups that multiply
  // sums[kRows / 8] of this warpgroup's unit, its outputs the 64 rows of the accumulator. wait_group<1>
  // leaves the products of this step in flight and says that those of the step before are done: its buffer is
  // released then, so that the tensor cores never wait for a release.
  __device__ void multiply_tile(float (&sums)[kRows / 8][4], int unit, int steps, Ring& ring) const {
    int previous = 0;
    wgmma_fence(sums);  // later steps only add to them: their fences have no registers to hand over
    for (int step = 0; step < steps; step++) {
      shared.buffers[ring.stage].wait_full(ring.parity);
      const uint64_t a = k_major_descriptor(shared_address(weight(ring.stage, unit)));
      const uint64_t b = k_major_descriptor(shared_address(x(ring.stage)));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kPanelColumns / kWgmmaDepth; k++)
        wgmma_mma_async<T, Major::k, Major::k>(sums, k_major_step(a, k, Tiles::kUnitBytes),
                                               k_major_step(b, k, Tiles::kRowsBytes), step + k > 0);
      wgmma_commit_group();
      wgmma_wait_group<1>();
      if (step > 0) shared.buffers[previous].release();
      previous = ring.stage;
      ring.advance();
    }
    wgmma_wait_group<0>(sums);
    shared.buffers[previous].release();
  }
  // A tile may have one unit: the other warpgroup releases its buffers all the same, since `empty` counts the
  // warps of both.
  __device__ void pass_tile(int steps, Ring& ring) const {
    for (int step = 0; step < steps; step++) {
      shared.buffers[ring.stage].wait_full(ring.parity);
      shared.buffers[ring.stage].release();
      ring.advance();
    }
  }
};

}  // namespace dllm::cuda::sm90
