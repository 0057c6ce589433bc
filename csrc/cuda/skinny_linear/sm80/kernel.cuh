// skinny_linear by mma.sync: a CTA takes a tile of outputs past the steps of one split. Rows of the weight
// are the left operand, so that few rows of x cost little; copies of a few steps are under way at any time.
// Bytes of a weight are widened in registers.
#pragma once

#include "cuda/launch_kernel.h"
#include "cuda/skinny_linear/byte_weight.cuh"
#include "cuda/skinny_linear/epilogue.cuh"
#include "cuda/skinny_linear/sm80/config.h"
#include "cuda/skinny_linear/sm80/launch.h"
#include "cuda/tiles/shared_tile.cuh"

namespace dllm::cuda::sm80 {

// Which row of eight a column of the product is. Lanes 0 to 15 read rows 0, 2, 4 and 6 at a time, which lie
// in different banks of a SharedTile where neighbours would share them.
__device__ constexpr int row_of_column(int column) {
  return column / 8 * 8 + column % 4 * 2 + column / 4 % 2;
}

// sums += bytes of the weight's rows [row, row + 16·kRowTiles), columns [64·half, 64·half + 64), times those
// of x. The sum runs in the order in which ldmatrix hands out bytes: of 16 inputs, lane `pair` of a group has
// 4·pair to 4·pair + 3, as the first two rows of b[0] and of b[1]. Column c of the sums is row
// row_of_column(c) of x.
template <class T, bool kE4m3, int kRowTiles, int kTiles>
__device__ void add_byte_products(float (&sums)[kRowTiles][kTiles][4], const SharedTile<T, 64>& weight,
                                  int row, const SharedTile<T, 128>& x, int half) {
  const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
  for (int k = 2 * half; k < 2 * half + 2; k++) {
    uint32_t bytes[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) weight.load_a(bytes[m], row + 16 * m, k);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[m][i] = widened_bytes<T, kE4m3>(bytes[m][2 * j + i % 2] >> i / 2 * 16);
      }
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const T* from = x.chunk(row_of_column(8 * n + group), 4 * k + 2 * j + pair / 2) + pair % 2 * 4;
        const auto b = *reinterpret_cast<const uint2*>(from);
#pragma unroll
        for (int m = 0; m < kRowTiles; m++) mma_m16n8k16<T>(sums[m][n], a[m], {b.x, b.y});
      }
    }
  }
}

template <class T, int kRows, bool kBytes, bool kE4m3>
__global__ void __launch_bounds__(LinearTiles<kRows, kBytes>::kThreads)
    linear_kernel(const __grid_constant__ SplitLinearParams params) {
  using Tiles = LinearTiles<kRows, kBytes>;
  constexpr int kThreads = Tiles::kThreads, kRowTiles = Tiles::kRowTiles, kStages = Tiles::kStages;
  constexpr int kOutputs = LinearSplits::kOutputs, kStepBytes = LinearSplits::kStepBytes;
  const SkinnyLinearParams& p = params.linear;
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();

  // ---- shared memory plan: [kStages] of rows of the weight, 16-bit values or pairs of bytes, and rows of x
  using WeightTile = SharedTile<T, kStepBytes / 2>;
  using XTile = SharedTile<T, Tiles::kInputs>;
  const auto weight_of = [&](int step) {
    return WeightTile{dynamic_shared<T>() + step % kStages * (Tiles::kStageBytes / 2)};
  };
  const auto x_of = [&](int step) { return XTile{weight_of(step).data + Tiles::kWeightBytes / 2}; };

  // ---- which outputs, steps and rows
  const int64_t row_tiles = (p.rows - 1) / kRows + 1;  // those of a tile of outputs run side by side
  const int64_t first_row = blockIdx.x % row_tiles * kRows, item = blockIdx.x / row_tiles;
  const auto first_output = static_cast<int32_t>(item / params.splits.splits * kOutputs);
  const int split = item % params.splits.splits;
  const int32_t begin = params.splits.begin(split), end = params.splits.begin(split + 1);

  const auto copy_step = [&](int32_t step) {
    if (step < end) {
      const int32_t input = step * Tiles::kInputs, left = p.inputs - input;
      const auto* rows =
          static_cast<const unsigned char*>(p.weight) + static_cast<int64_t>(step) * kStepBytes;
      weight_of(step).template copy_rows<kThreads, kOutputs>(kBytes ? left / 2 : left, [&](int i) {
        const int64_t offset = (first_output + i) * p.weight_stride * (kBytes ? 1 : 2);
        return first_output + i < p.outputs ? reinterpret_cast<const T*>(rows + offset) : nullptr;
      });
      x_of(step).template copy_rows<kThreads, kRows>(left, [&](int i) {
        const int64_t row = first_row + i;
        return row < p.rows ? static_cast<const T*>(p.x) + row * p.inputs + input : nullptr;
      });
    }
    cp_async_commit_group();
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; stage++) copy_step(begin + stage);

  // ---- main loop
  const int own = threadIdx.x / 32 * 16 * kRowTiles;  // the first output of this warp in the tile
  float sums[kRowTiles][kRows / 8][4] = {};
  float of_group[kBytes ? kRowTiles : 1][kRows / 8][4] = {};
#pragma unroll 1
  for (int32_t step = begin; step < end; step++) {
    cp_async_wait_group<kStages - 2>();
    __syncthreads();  // this step is there, the one before was used
    copy_step(step + kStages - 1);
    if constexpr (kBytes) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int32_t end_of_half = step * Tiles::kInputs + 64 * half + 64;
        if (end_of_half - 64 >= p.inputs) break;
        add_byte_products<T, kE4m3>(of_group, weight_of(step), own, x_of(step), half);
        if (!ends_group(p, end_of_half, half == 1 && step + 1 == end)) continue;
#pragma unroll
        for (int m = 0; m < kRowTiles; m++) {
          add_scaled(sums[m], of_group[m], p, first_output + own + 16 * m, end_of_half);
#pragma unroll
          for (int n = 0; n < kRows / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) of_group[m][n][i] = 0;
        }
      }
    } else {
      add_products_transposed(sums, weight_of(step), own, x_of(step));
    }
  }

  // ---- epilogue
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
    store_sums<T>(params, sums[m], first_output + own + 16 * m, split,
                  [&](int column) { return first_row + (kBytes ? row_of_column(column) : column); });
}

template <class T, int kRows, bool kBytes, bool kE4m3>
cudaError_t launch_linear_rows(const SplitLinearParams& p, cudaStream_t stream) {
  using Tiles = LinearTiles<kRows, kBytes>;
  const int64_t ctas = ((p.linear.rows - 1) / kRows + 1) * p.splits.items();
  return launch_overlapping_ctas(linear_kernel<T, kRows, kBytes, kE4m3>, ctas, Tiles::kThreads,
                                 Tiles::kSharedBytes, stream, p);
}

template <class T, bool kBytes, bool kE4m3>
cudaError_t launch_linear_weight(const SplitLinearParams& p, cudaStream_t stream) {
  return p.linear.rows <= 32 ? launch_linear_rows<T, 32, kBytes, kE4m3>(p, stream)
                             : launch_linear_rows<T, 64, kBytes, kE4m3>(p, stream);
}

template <class T>
cudaError_t launch_linear(const SplitLinearParams& p, cudaStream_t stream) {
  if (!p.linear.scales) return launch_linear_weight<T, false, false>(p, stream);
  return p.linear.e4m3 ? launch_linear_weight<T, true, true>(p, stream)
                       : launch_linear_weight<T, true, false>(p, stream);
}

}  // namespace dllm::cuda::sm80
