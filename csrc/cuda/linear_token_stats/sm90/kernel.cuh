// States of rows of hidden · weightᵀ + bias for Hopper. A CTA walks through a range of the vocabulary, tile
// by tile. One warp fetches, two warpgroups multiply: rows of the weight are the left operand, so that few
// rows of hidden states cost little. The logits of a tile pass through shared memory to the warps that own
// their rows, four neighbouring ids to a lane, while the next tile's weight is on its way. Every kRows sums a
// logit along the hidden size in the same order and takes it into the same lane's state: what a row gets does
// not depend on its companions.
#pragma once

#include "cuda/launch_kernel.h"
#include "cuda/linear_token_stats/sm90/launch.h"
#include "cuda/sm90/tile_ring.cuh"
#include "cuda/token_stats/add_ids.cuh"

namespace dllm::cuda::sm90 {

// The state of some ids of a row, and the logit of its token.
struct ProposalState {
  TokenState<float> state;
  float logit;

  __device__ void add(const RowStatsParams& p, int32_t row, int32_t first, float (&x)[4]) {
    const float logits[4] = {x[0], x[1], x[2], x[3]};
    add_ids(state, p, row_identity(p, row), first, x);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (state.token == first + i) logit = logits[i];
  }
};

template <class T, int kRows>
struct LinearStates {
  using Tiles = LinearStatsTiles<kRows>;
  struct Shared {
    BufferBarriers buffers[Tiles::kStages];
  };
  using Ring = RingPosition<Tiles::kStages>;

  const LinearStatesParams& p;
  Shared& shared;
  unsigned char* buffers;  // units of the weight, then hidden states
  float* logits;           // [kRows][kLogitsStride]
  int32_t begin, end;      // ids of this CTA
  int32_t first_row;

  __device__ unsigned char* weight(int stage, int unit) const {
    return buffers + stage * Tiles::kBufferBytes + unit * Tiles::kUnitBytes;
  }
  __device__ unsigned char* hidden(int stage) const { return weight(stage, Tiles::kConsumers); }
  __device__ int steps() const {
    return (p.linear.projection.hidden_size + kPanelColumns - 1) / kPanelColumns;
  }

  // ---- the thread that fetches
  __device__ void load() const {
    Ring ring;
    for (int32_t first = begin; first < end; first += Tiles::kIds) {
      const int units = first + Tiles::kUnit < end ? 2 : 1;
      for (int step = 0; step < steps(); step++) {
        BufferBarriers& buffer = shared.buffers[ring.stage];
        buffer.wait_empty(ring.parity);
        mbarrier_arrive_expect_tx(buffer.full, units * Tiles::kUnitBytes + Tiles::kHiddenBytes);
        for (int unit = 0; unit < units; unit++)
          cp_async_bulk_tensor(weight(ring.stage, unit), p.weight, buffer.full, step * kPanelColumns,
                               first + unit * Tiles::kUnit);
        cp_async_bulk_tensor(hidden(ring.stage), p.hidden, buffer.full, step * kPanelColumns, first_row);
        ring.advance();
      }
    }
  }

  // ---- the warpgroups that multiply
  // sums[kRows / 8] of this warpgroup's unit, its ids the 64 rows of the accumulator. wait_group<1> leaves
  // the products of this step in flight and says that those of the step before are done: its buffer is
  // released then, so that the tensor cores never wait for a release.
  __device__ void multiply_tile(float (&sums)[kRows / 8][4], int unit, Ring& ring) const {
    int previous = 0;
    wgmma_fence(sums);  // later steps only add to them: their fences have no registers to hand over
    for (int step = 0; step < steps(); step++) {
      shared.buffers[ring.stage].wait_full(ring.parity);
      const uint64_t a = k_major_descriptor(shared_address(weight(ring.stage, unit)));
      const uint64_t b = k_major_descriptor(shared_address(hidden(ring.stage)));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kPanelColumns / kWgmmaDepth; k++)
        wgmma_mma_async<T, Major::k, Major::k>(sums, k_major_step(a, k, Tiles::kUnitBytes),
                                               k_major_step(b, k, Tiles::kHiddenBytes), step + k > 0);
      wgmma_commit_group();
      wgmma_wait_group<1>();
      if (step > 0) shared.buffers[previous].release();
      previous = ring.stage;
      ring.advance();
    }
    wgmma_wait_group<0>(sums);
    shared.buffers[previous].release();
  }
  // The last tile of a range may have one unit: the other warpgroup releases its buffers all the same, since
  // `empty` counts the warps of both.
  __device__ void pass_tile(Ring& ring) const {
    for (int step = 0; step < steps(); step++) {
      shared.buffers[ring.stage].wait_full(ring.parity);
      shared.buffers[ring.stage].release();
      ring.advance();
    }
  }

  // By the layout that cuda/sm90/ptx.cuh draws: the accumulator's rows are ids, its columns rows of logits.
  __device__ void store_logits(const float (&sums)[kRows / 8][4], int unit) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
    float* to = logits + lane % 4 * 2 * Tiles::kLogitsStride + unit * Tiles::kUnit + 16 * warp + lane / 4;
#pragma unroll
    for (int n = 0; n < kRows / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) to[(8 * n + i % 2) * Tiles::kLogitsStride + i / 2 * 8] = sums[n][i];
  }

  __device__ float bias(int32_t id) const {
    const void* bias = p.linear.projection.bias;
    if (!bias || id >= end) return 0;
    switch (p.linear.projection.bias_type) {
      case DType::bfloat16: return widen(static_cast<const __nv_bfloat16*>(bias)[id]);
      case DType::float16: return widen(static_cast<const __half*>(bias)[id]);
      default: return static_cast<const float*>(bias)[id];
    }
  }

  // Row i of a warp is row warp + kConsumerWarps · i of the CTA.
  __device__ static int row_of_warp(int i) { return threadIdx.x / 32 + Tiles::kConsumerWarps * i; }

  __device__ void add_logits(ProposalState (&states)[Tiles::kRowsOfWarp], int32_t tile) const {
    const int column = threadIdx.x % 32 * 4;
    const int32_t first = tile + column;
    if (first >= end) return;
    const float shift[4] = {bias(first), bias(first + 1), bias(first + 2), bias(first + 3)};
#pragma unroll
    for (int i = 0; i < Tiles::kRowsOfWarp; i++) {
      const int row = row_of_warp(i);
      if (first_row + row >= p.linear.stats.rows) break;
      const auto sums = *reinterpret_cast<const float4*>(logits + row * Tiles::kLogitsStride + column);
      float x[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
      for (int j = 0; j < 4; j++) x[j] = first + j < end ? tame(x[j] + shift[j]) : -HUGE_VALF;
      states[i].add(p.linear.stats, first_row + row, first, x);
    }
  }

  __device__ void store_states(const ProposalState (&states)[Tiles::kRowsOfWarp]) const {
#pragma unroll
    for (int i = 0; i < Tiles::kRowsOfWarp; i++) {
      const int32_t row = first_row + row_of_warp(i);
      if (row >= p.linear.stats.rows) break;
      const TokenState<float> all = merged_lanes(states[i].state);
      const int64_t at = static_cast<int64_t>(row) * gridDim.y + blockIdx.y;
      if (threadIdx.x % 32 == 0) static_cast<TokenState<float>*>(p.linear.stats.states)[at] = all;
      if (all.token >= 0 && states[i].state.token == all.token) p.linear.proposals[at] = states[i].logit;
    }
  }

  __device__ void take_in(int unit) const {
    constexpr int kBarrier = 1, kConsumerThreads = Tiles::kConsumers * kWarpgroup;
    ProposalState states[Tiles::kRowsOfWarp] = {};
    Ring ring;
    for (int32_t first = begin; first < end; first += Tiles::kIds) {
      float sums[kRows / 8][4];
      const bool live = first + unit * Tiles::kUnit < end;
      if (live) multiply_tile(sums, unit, ring);
      else pass_tile(ring);
      // A warp has the logits of 16 ids for all rows, and takes in those of all ids for its own rows: they
      // change hands in shared memory. The barriers are of the consumers alone, so the producer fetches on.
      bar_sync(kBarrier, kConsumerThreads);  // all have taken in the last tile's logits
      if (live) store_logits(sums, unit);
      bar_sync(kBarrier, kConsumerThreads);  // all have stored this tile's
      add_logits(states, first);
    }
    store_states(states);
  }
};

template <class T, int kRows>
__global__ void __launch_bounds__(LinearStatsTiles<kRows>::kThreads, 1)
    linear_states_kernel(const __grid_constant__ LinearStatesParams p) {
  using Tiles = LinearStatsTiles<kRows>;
  using Role = LinearStates<T, kRows>;

  // ---- shared memory plan: kStages buffers of weight and hidden states, then one tile's logits
  unsigned char* panels = panel_shared();
  auto* logits = reinterpret_cast<float*>(panels + Tiles::kStages * Tiles::kBufferBytes);
  __shared__ typename Role::Shared shared;
  const VocabularyRanges ranges(p.linear.stats.vocabulary);
  const int32_t begin = blockIdx.y * ranges.ids;
  const int32_t end = begin + min(p.linear.stats.vocabulary - begin, ranges.ids);
  const Role role{p, shared, panels, logits, begin, end, static_cast<int32_t>(blockIdx.x * kRows)};

  if (threadIdx.x == 0) {
    for (BufferBarriers& buffer : shared.buffers) buffer.init(Tiles::kConsumerWarps);
    fence_mbarrier_init();
  }
  __syncthreads();

  // ---- roles
  constexpr int kProducer = Tiles::kConsumers * kWarpgroup;
  if (threadIdx.x < kProducer) role.take_in(threadIdx.x / kWarpgroup);
  else if (threadIdx.x == kProducer) role.load();
}

// Groups of rows that read the same part of the weight run side by side.
template <class T, int kRows>
cudaError_t launch_linear_states_kernel(const LinearStatesParams& p, cudaStream_t stream) {
  using Tiles = LinearStatsTiles<kRows>;
  const dim3 grid((p.linear.stats.rows + kRows - 1) / kRows,
                  VocabularyRanges(p.linear.stats.vocabulary).count);
  return launch_kernel(linear_states_kernel<T, kRows>, grid, Tiles::kThreads, Tiles::kSharedBytes, stream, p);
}

}  // namespace dllm::cuda::sm90
