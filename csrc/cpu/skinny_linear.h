// x · weightᵀ + bias for few rows of x.
#pragma once

#include "core/params.h"
#include "cpu/isa.h"

namespace dllm::cpu {

struct SkinnyProductParams : SkinnyLinearParams {
  // x as the product reads it, rows padded with zeros to padded_inputs(): floats, or bytes of the row's
  // scale.
  void* packed;
  float* x_scales;  // [rows], of an int8 weight
  bool dot_bytes;   // the processor multiplies and sums bytes in one instruction (VNNI)

  static constexpr int kOutputs = 64;  // of a work item
  static constexpr int kPadding = 64;  // elements
  int64_t padded_inputs() const {
    return (static_cast<int64_t>(inputs) + kPadding - 1) / kPadding * kPadding;
  }
  int64_t items() const { return (static_cast<int64_t>(outputs) + kOutputs - 1) / kOutputs; }
};

}  // namespace dllm::cpu

// Work items: rows. Fills `packed`, and `x_scales` for an int8 weight.
DLLM_CPU_KERNEL(pack_rows, SkinnyProductParams)
// Work items: kOutputs outputs of every row. Fills `out` from `packed`.
DLLM_CPU_KERNEL(skinny_product, SkinnyProductParams)
