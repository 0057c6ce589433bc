// Online softmax in base 2 over scores that a warp holds as mma accumulators.
#pragma once

#include "core/softmax_state.h"
#include "cuda/ptx.cuh"

namespace dllm::cuda {

// States of the rows that a lane shares with the three others of its group; sums are the lane's own until the
// end.
template <int kRowTiles>
class OnlineSoftmax {
 public:
  // Never 0: times that, minus infinity would not stay what it is.
  __device__ explicit OnlineSoftmax(float scale) : factor_(fmaxf(fabsf(scale) * 1.44269504f, 1e-30f)) {}

  // Turns scores into weights 2^(|scale|·log2(e)·score - shift). The shift is not the largest score but stays
  // as long as no weight exceeds 2^kSlack: sums that weights went into seldom have to be scaled. True where
  // they have.
  template <int kTiles>
  __device__ bool update(float (&scores)[kRowTiles][kTiles][4], float (&decay)[kRowTiles][2]) {
    bool moved = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kTiles; n++)
          largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2)) * factor_;

        SoftmaxState& state = states_[m][half];
        decay[m][half] = 1.0f;
        if (largest > state.max + kSlack) {
          decay[m][half] = fast_exp2(state.max - largest);
          state.max = largest;
          state.sum *= decay[m][half];
          moved = true;
        }
        const float shift = state.shift();
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; i++) {
            scores[m][n][i] = fast_exp2(fmaf(scores[m][n][i], factor_, -shift));
            state.sum += scores[m][n][i];
          }
        }
      }
    }
    return __any_sync(~0u, moved);
  }

  // The states of whole rows; to be called once, by all lanes.
  __device__ void finish() {
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float& sum = states_[m][half].sum;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
      }
    }
  }
  // Of row 16·m + group + 8·half.
  __device__ const SoftmaxState& state(int m, int half) const { return states_[m][half]; }

 private:
  static constexpr float kSlack = 8.0f;

  float factor_;
  SoftmaxState states_[kRowTiles][2];
};

// Keeps the scores whose bit is set: bit c of visible[i] for row i and column c.
template <int kRowTiles, int kTiles>
__device__ void hide_invisible(float (&scores)[kRowTiles][kTiles][4], const uint64_t* visible) {
  static_assert(kTiles <= 8);
  const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint64_t bits = visible[16 * m + group + 8 * half] >> 2 * pair;
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (!(bits >> (8 * n + i) & 1)) scores[m][n][2 * half + i] = -INFINITY;
      }
    }
  }
}

template <int kRowTiles, int kTiles>
__device__ void negate(float (&scores)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) scores[m][n][i] = -scores[m][n][i];
}

template <int kRowTiles, int kTiles>
__device__ void scale_rows(float (&sums)[kRowTiles][kTiles][4], const float (&factors)[kRowTiles][2]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; m++)
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[m][n][i] *= factors[m][i / 2];
}

}  // namespace dllm::cuda
