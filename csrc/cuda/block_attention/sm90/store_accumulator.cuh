// Rows of a warpgroup's sums to global memory, 16 bytes to a store.
#pragma once

#include "cuda/ptx.cuh"

namespace dllm::cuda::sm90 {

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

// Row `group` (half 0) or `group` + 8 (half 1) of `sums`, times `factor`, to `row`, where `live`; by all
// lanes.
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
