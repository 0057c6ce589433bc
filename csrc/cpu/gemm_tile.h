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

// C[kTileRows, kPanel] = decay * C + A · B.  A(m, s) = a[m * a_row + s * a_step]; B and C are dense.
// decay: one factor per column, or nullptr for C = A · B.
DLLM_SIMD void gemm_tile(const float* a, long a_row, long a_step, const float* b, float* c, int steps,
                         const Floats* decay) {
  Floats sum[kTileRows][kPanelVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; m++) {
#pragma GCC unroll 2
    for (int n = 0; n < kPanelVectors; n++)
      sum[m][n] = decay ? load(c + m * kPanel + n * kLanes) * decay[n] : Floats{};
  }
  for (int s = 0; s < steps; s++) {
    Floats row[kPanelVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kPanelVectors; n++) row[n] = load(b + s * kPanel + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; m++) {
      const Floats x = broadcast(a[m * a_row + s * a_step]);
#pragma GCC unroll 2
      for (int n = 0; n < kPanelVectors; n++) sum[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; m++) {
#pragma GCC unroll 2
    for (int n = 0; n < kPanelVectors; n++) store(c + m * kPanel + n * kLanes, sum[m][n]);
  }
}

}  // namespace dllm::cpu::DLLM_ISA
