// The logistic function of vectors.
#pragma once

#include "cpu/simd.h"

namespace dllm::cpu::DLLM_ISA {

// σ(x) and 1 − σ(x), both without cancellation, from e^−|x|.
struct Sigmoid {
  Floats value, rest;
};
DLLM_SIMD Sigmoid sigmoid(Floats x) {
  constexpr float kLog2e = 1.44269504f;
  const Ints negative = x < 0;
  const Floats e = exp2(select(negative, x, -x) * kLog2e);
  const Floats larger = 1.0f / (1.0f + e), smaller = e * larger;
  return {select(negative, smaller, larger), select(negative, larger, smaller)};
}

}  // namespace dllm::cpu::DLLM_ISA
