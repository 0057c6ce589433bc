// The product of a gated MLP: silu(gate) · up [Shazeer 2020].
#pragma once

#include <algorithm>

#include "core/params.h"
#include "cpu/isa.h"

namespace dllm::cpu {

// Rows of an item: some 16k elements.
inline int64_t silu_rows_per_item(int32_t width) { return 1 + (1 << 14) / std::max(width, 1); }
inline int64_t silu_items(const SiluMulParams& p) {
  const int64_t rows = silu_rows_per_item(p.width);
  return (p.rows + rows - 1) / rows;
}

}  // namespace dllm::cpu

// Work items: silu_rows_per_item(width) rows. Fills out.
DLLM_CPU_KERNEL(silu_mul, SiluMulParams)
// The same items. Fills grad_gate and grad_up.
DLLM_CPU_KERNEL(silu_mul_backward, SiluMulParams)
