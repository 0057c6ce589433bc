// Shared memory of the Hopper linear_token_stats kernel; host and device read the same numbers.
#pragma once

#include "cuda/linear_token_stats/config.h"
#include "cuda/sm90/weight_stream.h"

namespace dllm::cuda::sm90 {

// A row of a tile's logits in shared memory: stores of a warp, 8 ids of 4 pairs of rows, meet 32 banks.
constexpr int kLogitsStride = 2 * VocabularyRanges::kUnit + 4;

// The outputs are ids of the vocabulary, the rows of x are hidden states.
template <int kRows>
struct LinearStatsTiles : WeightStreamTiles<kRows, kRows * kLogitsStride * sizeof(float)> {
  using Stream = WeightStreamTiles<kRows, kRows * kLogitsStride * sizeof(float)>;
  static_assert(Stream::kUnit == VocabularyRanges::kUnit);
  static constexpr int kRowsOfWarp = kRows / Stream::kConsumerWarps;
};

}  // namespace dllm::cuda::sm90
