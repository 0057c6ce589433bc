// Statistics of the rows of hidden · weightᵀ + bias, without storing these logits.
#pragma once

#include "cpu/token_stats.h"

namespace dllm::cpu {

struct LinearStatsParams : PartedStatsParams, Projection {
  float* packed;  // hidden as the product reads it: packed_size() floats

  static constexpr int32_t kPart = 1024;  // ids of a part
  static constexpr int kRows = 64;        // rows that a part of the weight meets at once
  static constexpr int kStrip = 16;       // rows are packed in multiples of this
  DLLM_HOST_DEVICE int64_t row_groups() const { return (rows + kRows - 1) / kRows; }
  DLLM_HOST_DEVICE int64_t packed_size() const { return (rows + kStrip - 1) / kStrip * kStrip * hidden_size; }
};

}  // namespace dllm::cpu

// Work items: groups of kRows rows. Fills `packed`.
DLLM_CPU_KERNEL(pack_hidden, LinearStatsParams)
// Work items: (part, group of rows). Fills `states` from `packed`.
DLLM_CPU_KERNEL(linear_token_states, LinearStatsParams)
