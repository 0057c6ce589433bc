// Rows of 16-bit values in shared memory, filled by asynchronous copies and read as fragments of
// mma.m16n8k16. Of row r, 16-byte chunk c lies in place c ^ (r mod 8): the same chunk of eight neighbouring
// rows, which is what a copy writes and ldmatrix reads at a time, is spread over all banks.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace dllm::cuda {

template <class T, int kDim>
struct SharedTile {
  static_assert(sizeof(T) == 2 && kDim % 64 == 0);
  static constexpr int kChunks = kDim / 8;

  T* data;  // [rows][kDim]

  __device__ T* chunk(int row, int c) const { return data + row * kDim + (c ^ (row & 7)) * 8; }

  // Starts copying kRows rows: row(i) finds the first of the `dim` values of row i, aligned to 16 bytes, or
  // is null for a row of zeros. All threads call it, kRowThreads share a row: fewer ask for fewer rows.
  template <int kThreads, int kRows, int kRowThreads = kChunks < 16 ? 8 : 16, class Row>
  __device__ void copy_rows(int dim, Row row) const {
    static_assert(kRows * kRowThreads % kThreads == 0 && kChunks % kRowThreads == 0);
    const int first = threadIdx.x % kRowThreads;
#pragma unroll
    for (int i = 0; i < kRows; i += kThreads / kRowThreads) {
      const int r = i + threadIdx.x / kRowThreads;
      const T* from = row(r);
#pragma unroll
      for (int n = 0; n < kChunks; n += kRowThreads) {
        const int c = first + n;
        cp_async(chunk(r, c), from + c * 8, from != nullptr && c * 8 < dim);
      }
    }
  }

  // A: rows [row, row + 16), columns [16k, 16k + 16).
  __device__ void load_a(uint32_t (&a)[4], int row, int k) const {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(a, lane_chunk(row, lane % 16, 2 * k, lane / 16));
  }

  // B of a product with the transposed tile: rows [row, row + 16) are its columns, the first eight in b[0]
  // and b[1], columns [16k, 16k + 16) its rows.
  __device__ void load_transposed_b(uint32_t (&b)[4], int row, int k) const {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(b, lane_chunk(row, lane / 16 * 8 + lane % 8, 2 * k, lane / 8 % 2));
  }

  // B of a product with the tile: its rows [row, row + 16), its columns [16n, 16n + 16), the first eight in
  // b[0] and b[1].
  __device__ void load_b(uint32_t (&b)[4], int row, int n) const {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4_trans(b, lane_chunk(row, lane % 16, 2 * n, lane / 16));
  }

  // Columns from `column` on of rows [row, row + 16·kRowTiles) become `sums`, rounded to T, of the warp that
  // calls it.
  template <int kRowTiles, int kTiles>
  __device__ void put(const float (&sums)[kRowTiles][kTiles][4], int row, int column = 0) const {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++)
          *reinterpret_cast<uint32_t*>(chunk(row + 16 * m + group + 8 * half, column / 8 + n) + 2 * pair) =
              pack<T>(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      }
    }
  }

  // kColumns columns from `column` on, as far as `dim` goes, of rows [first, last) to where to(i) finds row
  // i, by the warp that calls it.
  template <int kColumns, class Row>
  __device__ void store_rows(int first, int last, int dim, Row to, int column = 0) const {
    constexpr int kWidth = kColumns / 8;
    for (int i = first * kWidth + threadIdx.x % 32; i < last * kWidth; i += 32) {
      const int row = i / kWidth, c = column / 8 + i % kWidth;
      if (c * 8 < dim)
        *reinterpret_cast<uint4*>(to(row) + c * 8) = *reinterpret_cast<const uint4*>(chunk(row, c));
    }
  }

 private:
  // chunk(row + lane_row, even + odd) for a row of a multiple of 8, an even chunk and the one beside it, with
  // what differs between lanes apart: it is computed once for a whole tile.
  __device__ T* lane_chunk(int row, int lane_row, int even, int odd) const {
    return data + row * kDim + ((lane_row * kDim + (odd ^ (lane_row & 7)) * 8) ^ (even * 8));
  }
};

// A warp holds sums of products of 16·kRowTiles rows with 8·kTiles columns as float[kRowTiles][kTiles][4]. As
// in ptx.cuh, for lane = 4·group + pair: [m][n] has row 16·m + group in [0] and [1] and row 16·m + group + 8
// in [2] and [3], columns 8·n + 2·pair and the next one.

// sums += a times `b` transposed (its rows from 0 on); load_a(fragments, k) gives columns [16k, 16k + 16) of
// a. kUnroll: how many steps along kDim to unroll; fewer leave more registers to the caller.
template <int kUnroll, class T, int kDim, int kRowTiles, int kTiles, class LoadA>
__device__ void add_products_transposed(float (&sums)[kRowTiles][kTiles][4], LoadA load_a,
                                        const SharedTile<T, kDim>& b) {
#pragma unroll kUnroll
  for (int k = 0; k < kDim / 16; k++) {
    uint32_t left[kRowTiles][4];
    load_a(left, k);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t right[4];
      b.load_transposed_b(right, n * 8, k);
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
        mma_m16n8k16<T>(sums[m][n], left[m], {right[0], right[1]});
        mma_m16n8k16<T>(sums[m][n + 1], left[m], {right[2], right[3]});
      }
    }
  }
}

// The same where a is rows [row, row + 16·kRowTiles) of a tile.
template <int kUnroll = 4, class T, int kDim, int kRowTiles, int kTiles>
__device__ void add_products_transposed(float (&sums)[kRowTiles][kTiles][4], const SharedTile<T, kDim>& a,
                                        int row, const SharedTile<T, kDim>& b) {
  const auto load_a = [&](uint32_t (&left)[kRowTiles][4], int k) {
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) a.load_a(left[m], row + 16 * m, k);
  };
  add_products_transposed<kUnroll>(sums, load_a, b);
}

// sums += weights, rounded to T, times the columns of `b` from `column` on: the columns of the weights are
// its rows.
template <class T, int kDim, int kRowTiles, int kTiles, int kColumnTiles>
__device__ void add_products(float (&sums)[kRowTiles][kColumnTiles][4],
                             const float (&weights)[kRowTiles][kTiles][4], const SharedTile<T, kDim>& b,
                             int column = 0) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; k++) {
    uint32_t left[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* pair = &weights[m][2 * k + i / 2][i % 2 * 2];
        left[m][i] = pack<T>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      uint32_t right[4];
      b.load_b(right, 16 * k, column / 16 + n / 2);
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
        mma_m16n8k16<T>(sums[m][n], left[m], {right[0], right[1]});
        mma_m16n8k16<T>(sums[m][n + 1], left[m], {right[2], right[3]});
      }
    }
  }
}

}  // namespace dllm::cuda
