// The one matrix product of the CPU kernels: a tile of C in registers, A broadcast element by element,
// B one panel of kPanel columns. Both products of attention use it with queries as columns, so that
// keys and values are read as they are stored and the softmax runs down columns, one query per lane.
#pragma once

#include "cpu/simd.h"

namespace dllm::cpu::DLLM_ISA {

constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kLanes;
// Rows of a register tile: accumulators, a panel row and a broadcast fill the register file.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;

struct FetchNothing {
  DLLM_SIMD void operator()(int) const {}
};

// C[kRows, kVectors * kLanes] = decay * C + A · B.  A(m, s) = a[m * a_row + s * a_step]; B and C are dense.
// decay: one factor per column, or nullptr for C = A · B. fetch(s) is called once a step: it may prefetch.
template <int kRows = kTileRows, int kVectors = kPanelVectors, class Fetch = FetchNothing>
DLLM_SIMD void gemm_tile(const float* a, long a_row, long a_step, const float* b, float* c, int steps,
                         const Floats* decay, const Fetch& fetch = {}) {
  constexpr int kWidth = kVectors * kLanes;
  Floats sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; n++)
      sum[m][n] = decay ? load(c + m * kWidth + n * kLanes) * decay[n] : Floats{};
  }
  for (int s = 0; s < steps; s++) {
    fetch(s);
    Floats row[kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; n++) row[n] = load(b + s * kWidth + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const Floats x = broadcast(a[m * a_row + s * a_step]);
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; n++) sum[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; n++) store(c + m * kWidth + n * kLanes, sum[m][n]);
  }
}

}  // namespace dllm::cpu::DLLM_ISA
