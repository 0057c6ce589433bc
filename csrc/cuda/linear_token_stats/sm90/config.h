// Tiles and shared memory of the Hopper linear_token_stats kernel; host and device read the same numbers.
#pragma once

#include "cuda/linear_token_stats/config.h"
#include "cuda/sm90/limits.h"
#include "cuda/sm90/matrix_descriptor.h"

namespace dllm::cuda::sm90 {

// A tile is two units of ids, one for each warpgroup that multiplies, times kRows rows of hidden states; a
// buffer holds 64 of the hidden size of both. One more warp fetches.
template <int kRows>
struct LinearStatsTiles {
  static constexpr int kConsumers = 2, kConsumerWarps = kConsumers * kWarpgroup / 32;
  static constexpr int kThreads = kConsumers * kWarpgroup + 32;
  static constexpr int kUnit = VocabularyRanges::kUnit;
  static constexpr int kIds = kConsumers * kUnit;
  static constexpr int kRowsOfWarp = kRows / kConsumerWarps;

  static constexpr int kUnitBytes = panel_bytes(kUnit), kHiddenBytes = panel_bytes(kRows);
  static constexpr int kBufferBytes = kConsumers * kUnitBytes + kHiddenBytes;
  // A row of logits in shared memory: stores of a warp, 8 ids of 4 pairs of rows, meet 32 banks.
  static constexpr int kLogitsStride = kIds + 4;
  static constexpr int kLogitsBytes = kRows * kLogitsStride * sizeof(float);
  static constexpr int kStages = (220 * 1024 - kLogitsBytes) / kBufferBytes;
  static constexpr size_t kSharedBytes = kPanelAlignment + kStages * kBufferBytes + kLogitsBytes;
  static_assert(kSharedBytes + 1024 <= kMaxSharedBytes, "barriers come on top");
  static_assert(kBufferBytes % kPanelAlignment == 0 && kStages >= 4);
};

constexpr int kMaxLinearRows = 64;  // of hidden states that one CTA takes

// 8, 16, 32 or 64.
constexpr int linear_rows(int64_t rows) {
  int tile = 8;
  while (tile < rows && tile < kMaxLinearRows) tile *= 2;
  return tile;
}

}  // namespace dllm::cuda::sm90
