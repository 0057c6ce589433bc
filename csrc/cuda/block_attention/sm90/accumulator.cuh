// What becomes of a warpgroup's accumulators, whose layout cuda/sm90/ptx.cuh draws: the operand of the next
// product, or rows of global memory.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/sm90/limits.h"

namespace dllm::cuda::sm90 {

// The first of the two rows of its warpgroup's 64 that this thread holds values of; the other one is 8 below.
__device__ inline int accumulator_row() { return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4; }
// The same among the rows of all warpgroups, 64 for each.
__device__ inline int accumulator_row(int group) {
  return 64 * group + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
}

// Columns of scores as the left operand of the next product.
template <class T, int kSteps>
__device__ void pack_columns(uint32_t (&packed)[kSteps][4], const float (&scores)[2 * kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; step++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      packed[step][i] = pack<T>(scores[2 * step + i / 2][i % 2 * 2], scores[2 * step + i / 2][i % 2 * 2 + 1]);
}

// words[i] of lane j among four neighbours becomes words[j] of lane i.
__device__ inline void transpose_among_four(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? words[i] : words[i | bit], bit);
      (upper ? words[i] : words[i | bit]) = other;
    }
  }
}

// The first of a thread's two rows (half 0) or the second (half 1) of `sums`, times `factor`, to `row`, where
// `live`; by all lanes. Four lanes hold a row, two columns of every 8 each: they transpose among themselves,
// so that each stores 16 bytes.
template <class T, int kTiles>
__device__ void store_accumulator_row(T* row, const float (&sums)[kTiles][4], int half, float factor,
                                      bool live) {
  const int pair = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTiles; n += 4) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      words[i] = pack<T>(sums[n + i][2 * half] * factor, sums[n + i][2 * half + 1] * factor);
    transpose_among_four(words);
    if (live) *reinterpret_cast<uint4*>(row + 8 * (n + pair)) = uint4{words[0], words[1], words[2], words[3]};
  }
}

}  // namespace dllm::cuda::sm90
