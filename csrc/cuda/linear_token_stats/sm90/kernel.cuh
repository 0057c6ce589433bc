// States of rows of hidden · weightᵀ + bias for Hopper. A CTA walks through a range of the vocabulary, tile
// by tile. The logits of a tile pass through shared memory to the warps that own their rows, four
// neighbouring ids to a lane, while the next tile's weight is on its way. Every kRows takes a logit into the
// same lane's state: what a row gets does not depend on its companions.
#pragma once

#include "cuda/launch_kernel.h"
#include "cuda/linear_token_stats/sm90/launch.h"
#include "cuda/sm90/weight_stream.cuh"
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
  using Stream = WeightStream<T, kRows, Tiles>;
  using Ring = typename Stream::Ring;

  const LinearStatesParams& p;
  Stream stream;
  float* logits;       // [kRows][kLogitsStride]
  int32_t begin, end;  // ids of this CTA

  __device__ int32_t steps() const {
    return (p.linear.projection.hidden_size + kPanelColumns - 1) / kPanelColumns;
  }

  __device__ void load() const {
    Ring ring;
    for (int32_t first = begin; first < end; first += Tiles::kOutputs)
      stream.load_tile({first, end, 0, steps()}, ring);
  }

  // By the layout that cuda/sm90/ptx.cuh draws: the accumulator's rows are ids, its columns rows of logits.
  __device__ void store_logits(const float (&sums)[kRows / 8][4], int unit) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
    float* to = logits + lane % 4 * 2 * kLogitsStride + unit * Tiles::kUnit + 16 * warp + lane / 4;
#pragma unroll
    for (int n = 0; n < kRows / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) to[(8 * n + i % 2) * kLogitsStride + i / 2 * 8] = sums[n][i];
  }

  __device__ float bias(int32_t id) const {
    const Projection& product = p.linear.projection;
    return product.bias && id < end ? value_at(product.bias, product.bias_type, id) : 0;
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
      if (stream.first_row + row >= p.linear.stats.rows) break;
      const auto sums = *reinterpret_cast<const float4*>(logits + row * kLogitsStride + column);
      float x[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
      for (int j = 0; j < 4; j++) x[j] = first + j < end ? tame(x[j] + shift[j]) : -HUGE_VALF;
      states[i].add(p.linear.stats, stream.first_row + row, first, x);
    }
  }

  __device__ void store_states(const ProposalState (&states)[Tiles::kRowsOfWarp]) const {
#pragma unroll
    for (int i = 0; i < Tiles::kRowsOfWarp; i++) {
      const int32_t row = stream.first_row + row_of_warp(i);
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
    for (int32_t first = begin; first < end; first += Tiles::kOutputs) {
      float sums[kRows / 8][4];
      const bool live = first + unit * Tiles::kUnit < end;
      if (live) stream.multiply_tile(sums, unit, steps(), ring);
      else stream.pass_tile(steps(), ring);
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
  auto* logits = reinterpret_cast<float*>(panels + Tiles::kRingBytes);
  __shared__ typename Role::Stream::Shared shared;
  const VocabularyRanges ranges(p.linear.stats.vocabulary);
  const int32_t begin = blockIdx.y * ranges.ids;
  const int32_t end = begin + min(p.linear.stats.vocabulary - begin, ranges.ids);
  const auto first_row = static_cast<int32_t>(blockIdx.x * kRows);
  const Role role{p, {p.weight, p.hidden, shared, panels, first_row}, logits, begin, end};
  shared.init();

  // ---- roles
  if (threadIdx.x < Tiles::kProducer) role.take_in(threadIdx.x / kWarpgroup);
  else if (threadIdx.x == Tiles::kProducer) role.load();
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
