// Tiles and shared memory of the Hopper skinny_linear kernel; host and device read the same numbers.
#pragma once

#include "cuda/skinny_linear/config.h"
#include "cuda/sm90/weight_stream.h"

namespace dllm::cuda::sm90 {

// kBytes: of a weight in bytes.
template <int kRows, bool kBytes>
struct StreamedLinearTiles : WeightStreamTiles<kRows, 0, kBytes ? 2 : 1> {
  static_assert(WeightStreamTiles<kRows, 0>::kOutputs == LinearSplits::kOutputs);
  static_assert(kPanelRowBytes == LinearSplits::kStepBytes);
};

}  // namespace dllm::cuda::sm90
