// x · weightᵀ + bias for few rows of x, from a weight that is stored in panels.
#pragma once

#include "core/params.h"
#include "cpu/isa.h"

namespace dllm::cpu {

// A weight as the product streams it: panels of kPanel outputs, each [units of inputs][kPanel]. A unit has 32
// bits: one float32 input, two bfloat16 inputs, or four bytes with 128 added. Zeros stand for what is missing
// in the last unit and in the last panel.
struct PackedWeightLayout {
  DType weight_type;
  bool bytes;  // int8, whatever weight_type says
  int32_t inputs, outputs;

  static constexpr int kPanel = 16;
  int unit_inputs() const { return bytes ? 4 : weight_type == DType::bfloat16 ? 2 : 1; }
  int row_units() const { return static_cast<int>((int64_t{inputs} + unit_inputs() - 1) / unit_inputs()); }
  int64_t panel_units() const { return int64_t{row_units()} * kPanel; }
  int64_t panels() const { return (int64_t{outputs} + kPanel - 1) / kPanel; }
};

struct PackWeightParams : PackedWeightLayout {
  const void* weight;  // [outputs, inputs], rows weight_stride elements apart; float16 becomes float32
  int64_t weight_stride;
  void* out;
};

struct SkinnyProductParams : PackedWeightLayout {
  const void* x;  // [rows, inputs], contiguous
  const void* weight;
  const float* scales;  // [groups, weight_panels() * kPanel] of int8, else null
  const void* bias;     // [outputs], or [2, outputs] if gated, or null
  void* out;            // [rows, outputs], in the type of x
  DType x_type, bias_type;
  int64_t rows;
  int32_t groups;  // each of inputs / groups inputs
  // x as the product reads it, rows read_stride elements apart: floats, or bytes of the row's scale, zeros up
  // to padded_inputs().
  void* read;
  int64_t read_stride;
  float* x_scales;  // [rows], for bytes
  int32_t* x_sums;  // [rows, groups], of bytes
  // Panels of gate and up alternate, and out = silu(gate) · up.
  bool gated;
  bool dot_bytes;  // the processor multiplies and sums bytes in one instruction (VNNI)

  static constexpr int kMostItemPanels = 6;
  int item_panels() const { return gated ? kMostItemPanels : kMostItemPanels / 2; }
  int64_t weight_panels() const { return gated ? 2 * panels() : panels(); }
  int padded_inputs() const { return row_units() * unit_inputs(); }
  int64_t items() const { return (weight_panels() + item_panels() - 1) / item_panels(); }
};

}  // namespace dllm::cpu

// Work items: panels. Fills `out`.
DLLM_CPU_KERNEL(pack_panels, PackWeightParams)
// Work items: rows. Fills `read`, and x_scales and x_sums for bytes.
DLLM_CPU_KERNEL(pack_rows, SkinnyProductParams)
// Work items: item_panels() panels of every row. Fills `out`.
DLLM_CPU_KERNEL(skinny_product, SkinnyProductParams)
