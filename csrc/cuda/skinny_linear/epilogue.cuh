// What becomes of the sums of a tile: results, or the sums of one split.
#pragma once

#include "cuda/skinny_linear/launch.h"
#include "cuda/widen.cuh"

namespace dllm::cuda {

template <class T>
__device__ void store_result(const SkinnyLinearParams& p, int64_t row, int32_t output, float sum) {
  const float bias = p.bias ? value_at(p.bias, p.bias_type, output) : 0.0f;
  const float scale = p.x_scales ? p.x_scales[row] : 1.0f;
  static_cast<T*>(p.out)[row * p.outputs + output] = T(fmaf(scale, sum, bias));
}

// Of a warp: the accumulators of 16 outputs from `output` on, 8·kTiles rows of x, as cuda/ptx.cuh draws them.
// row(column) finds the row of a column of theirs.
template <class T, int kTiles, class Row>
__device__ void store_sums(const SplitLinearParams& p, const float (&sums)[kTiles][4], int32_t output,
                           int split, Row row) {
  const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int32_t at = output + group + i / 2 * 8;
      const int64_t r = row(8 * n + 2 * pair + i % 2);
      if (at >= p.linear.outputs || r >= p.linear.rows) continue;
      if (p.partial) p.partial[(split * p.linear.rows + r) * p.linear.outputs + at] = sums[n][i];
      else store_result<T>(p.linear, r, at, sums[n][i]);
    }
  }
}

}  // namespace dllm::cuda
