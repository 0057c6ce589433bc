// Root mean square normalization [Zhang & Sennrich 2019], alone and of a sum with the residual stream.
#pragma once

#include "core/params.h"
#include "cpu/isa.h"
#include "cpu/row_items.h"

namespace dllm::cpu {

constexpr int kNormColumns = 256;  // of an item of rms_norm_weight_gradient
inline int64_t norm_weight_items(const RmsNormBackwardParams& p) {
  return (p.width + kNormColumns - 1) / kNormColumns;
}

}  // namespace dllm::cpu

// Work items: rows_per_item(width) rows. Fills out, and sum where there is a residual.
DLLM_CPU_KERNEL(rms_norm, RmsNormParams)
// Work items: rows_per_sum rows. Fills grad_x, and a row of weight_sums where these are not null.
DLLM_CPU_KERNEL(rms_norm_backward, RmsNormBackwardParams)
// Work items: kNormColumns columns. Fills grad_weight from weight_sums.
DLLM_CPU_KERNEL(rms_norm_weight_gradient, RmsNormBackwardParams)
