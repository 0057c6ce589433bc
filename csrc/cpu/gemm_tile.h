// The one matrix product of the CPU kernels: a tile of C in registers, A broadcast element by element,
// B and C one panel of kPanel columns. The attention kernels use it with queries as columns, so that keys
// and values are read as they are stored and the softmax runs down columns, one query per lane.
#pragma once

#include "cpu/simd.h"

namespace dllm::cpu::DLLM_ISA {

constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kLanes;
// Rows of a register tile: accumulators, a panel row and a broadcast fill the register file.
constexpr int kTileRows = kLanes == 16 ? 8 : 6;

// A(m, s) = data[m * row + s * step]; a transposed product swaps the two strides.
struct Left {
  const float* data;
  long row, step;
};
// kPanel columns; rows are `row` floats apart.
struct Right {
  const float* data;
  long row;
};
struct Result {
  float* data;
  long row;
};

// What C is multiplied with before A · B is added to it: a factor per column, or nothing stays of it.
constexpr const Floats* kOverwrite = nullptr;
constexpr Floats kAccumulate[kPanelVectors] = {Floats{} + 1.0f, Floats{} + 1.0f};

struct FetchNothing {
  DLLM_SIMD void operator()(int) const {}
};

// C[kRows, kVectors * kLanes] = keep * C + A · B. Every element is one chain of multiply-adds in the order of
// the steps: how rows and steps are cut into tiles does not change a bit of it. fetch(s) is called once a
// step: it may prefetch.
template <int kRows = kTileRows, int kVectors = kPanelVectors, class Fetch = FetchNothing>
DLLM_SIMD void gemm_tile(Left a, Right b, Result c, int steps, const Floats* keep, const Fetch& fetch = {}) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; n++)
      sum[m][n] = keep ? load(c.data + m * c.row + n * kLanes) * keep[n] : Floats{};
  }
  for (int s = 0; s < steps; s++) {
    fetch(s);
    Floats row[kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; n++) row[n] = load(b.data + s * b.row + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const Floats x = broadcast(a.data[m * a.row + s * a.step]);
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; n++) sum[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; n++) store(c.data + m * c.row + n * kLanes, sum[m][n]);
  }
}

// The same for any number of rows.
template <int kRows = kTileRows, class Fetch = FetchNothing>
void gemm(Left a, Right b, Result c, int rows, int steps, const Floats* keep, const Fetch& fetch = {}) {
  for (; rows >= kRows; rows -= kRows) {
    gemm_tile<kRows>(a, b, c, steps, keep, fetch);
    a.data += kRows * a.row;
    c.data += kRows * c.row;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) gemm<(kRows > 4 ? 4 : kRows / 2)>(a, b, c, rows, steps, keep, fetch);
  }
}

}  // namespace dllm::cpu::DLLM_ISA
