// Root mean square normalization [Zhang & Sennrich 2019], alone and of a sum with the residual stream.
#pragma once

#include <algorithm>

#include "core/params.h"
#include "cpu/isa.h"

namespace dllm::cpu {

// Rows of an item: some 16k elements.
inline int64_t norm_rows_per_item(int32_t width) { return 1 + (1 << 14) / std::max(width, 1); }
inline int64_t norm_items(const RmsNormParams& p) {
  const int64_t rows = norm_rows_per_item(p.width);
  return (p.rows + rows - 1) / rows;
}

constexpr int kNormColumns = 256;  // of an item of rms_norm_weight_gradient
inline int64_t norm_weight_items(const RmsNormBackwardParams& p) {
  return (p.width + kNormColumns - 1) / kNormColumns;
}

}  // namespace dllm::cpu

// Work items: norm_rows_per_item(width) rows. Fills out, and sum where there is a residual.
DLLM_CPU_KERNEL(rms_norm, RmsNormParams)
// Work items: rows_per_sum rows. Fills grad_x, and a row of weight_sums where these are not null.
DLLM_CPU_KERNEL(rms_norm_backward, RmsNormBackwardParams)
// Work items: kNormColumns columns. Fills grad_weight from weight_sums.
DLLM_CPU_KERNEL(rms_norm_weight_gradient, RmsNormBackwardParams)
