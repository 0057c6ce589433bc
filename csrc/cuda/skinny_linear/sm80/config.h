// Tiles and shared memory of skinny_linear by mma.sync; host and device read the same numbers.
#pragma once

#include <stddef.h>

#include "cuda/skinny_linear/config.h"

namespace dllm::cuda::sm80 {

// Each of four warps owns 32 outputs of a tile, times kRows rows of x. A stage holds a step of both: of a
// weight in bytes (kBytes) twice as many inputs.
template <int kRows, bool kBytes>
struct LinearTiles {
  static constexpr int kThreads = 128;
  static constexpr int kRowTiles = 2;  // of 16 outputs, to a warp
  static constexpr int kInputs = kBytes ? 128 : 64;
  static constexpr int kWeightBytes = LinearSplits::kOutputs * LinearSplits::kStepBytes;
  static constexpr int kStageBytes = kWeightBytes + kRows * kInputs * 2;
  static constexpr int kFittingStages = 96 * 1024 / kStageBytes;
  static constexpr int kStages = kFittingStages < 4 ? kFittingStages : 4;
  static constexpr size_t kSharedBytes = kStages * kStageBytes;
  static_assert(kThreads / 32 * kRowTiles * 16 == LinearSplits::kOutputs && kStages >= 3);
  static_assert(kSharedBytes <= 99 * 1024, "fits every GPU from Ampere on");
};

}  // namespace dllm::cuda::sm80
