// Tiles of float32 in shared memory: how they are filled, and the products of their rows, four values at a
// time.
#pragma once

#include "cuda/block_attention/fp32/config.h"
#include "cuda/tiles/float4.cuh"

namespace dllm::cuda::fp32 {

// kRows rows of `dim` values, times `factor`: row(i) finds row i, null is a row of zeros.
template <int kDim, int kRows, class Row>
__device__ void load_tile(int dim, float factor, float* to, Row row) {
  constexpr int kGroups = kDim / 4;
  for (int i = threadIdx.x; i < kRows * kGroups; i += kThreads) {
    const int r = i / kGroups, d = i % kGroups * 4;
    const float* from = row(r);
    float4 x = {0, 0, 0, 0};
    if (from && d < dim) x = scaled(load4(from + d), factor);
    store4(to + r * kRowWords<kDim> + d, x);
  }
}

// Products of this thread's rows `row` to row + kThreadRows - 1 of `a` with every 16th row of `b` from
// `column` on.
template <int kDim, int kColumns>
__device__ void add_row_products(float (&sums)[kThreadRows][kColumns], const float* a, int row,
                                 const float* b, int column, int dim) {
#pragma unroll 2
  for (int d = 0; d < dim; d += 4) {
    float4 right[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; j++) right[j] = load4(b + (column + j * kRowThreads) * kRowWords<kDim> + d);
#pragma unroll
    for (int i = 0; i < kThreadRows; i++) {
      const float4 left = load4(a + (row + i) * kRowWords<kDim> + d);
#pragma unroll
      for (int j = 0; j < kColumns; j++) sums[i][j] = dot(left, right[j], sums[i][j]);
    }
  }
}

// sums += weights [kTileRows][kRowWords<kColumns>] times rows `b`: this thread's rows, its groups of 4 dims.
template <int kDim, int kColumns>
__device__ void add_weighted_rows(float4 (&sums)[kThreadRows][kDim / 64], const float* weights, int row,
                                  const float* b, int column) {
  for (int j = 0; j < kColumns; j++) {
    float weight[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; i++) weight[i] = weights[(row + i) * kRowWords<kColumns> + j];
#pragma unroll
    for (int c = 0; c < kDim / 64; c++) {
      const float4 x = load4(b + j * kRowWords<kDim> + c * 64 + column * 4);
#pragma unroll
      for (int i = 0; i < kThreadRows; i++) sums[i][c] = add_scaled(sums[i][c], x, weight[i]);
    }
  }
}

}  // namespace dllm::cuda::fp32
