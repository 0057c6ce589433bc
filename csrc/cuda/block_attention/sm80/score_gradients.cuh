// From scores to softmax weights P and gradients dS of the scores, as mma accumulators.
#pragma once

#include "cuda/ptx.cuh"

namespace dllm::cuda::sm80 {

// scores: k·q, becomes P = 2^(factor k·q - x); grads: dO·v, becomes dS = P (dO·v - y), with {x, y} =
// terms(row, column) of the query. Where visible(row, column) does not hold both become 0, whatever they
// were.
template <int kRowTiles, int kTiles, class Terms, class Visible>
__device__ void score_gradients(float (&scores)[kRowTiles][kTiles][4], float (&grads)[kRowTiles][kTiles][4],
                                float factor, Terms terms, Visible visible) {
  const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = 16 * m + group + i / 2 * 8, column = 8 * n + 2 * pair + i % 2;
        const float2 term = terms(row, column);
        float& weight = scores[m][n][i];
        float& grad = grads[m][n][i];
        weight = fast_exp2(fmaf(weight, factor, -term.x));
        grad = weight * (grad - term.y);
        if (!visible(row, column)) weight = grad = 0.0f;
      }
    }
  }
}

}  // namespace dllm::cuda::sm80
