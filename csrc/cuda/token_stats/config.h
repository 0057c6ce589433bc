// Shape of the token_stats kernels; host and device read the same numbers.
#pragma once

#include <cstdint>

namespace dllm::cuda {

constexpr int kStatsThreads = 256;
constexpr int kStatsWarps = kStatsThreads / 32;
// One CTA reads this many token ids of one row. The cut depends on the vocabulary alone, and ranges merge
// in order, so a row's result does not depend on how many rows there are.
constexpr int kStatsRange = 16384;

constexpr int kCutThreads = 512;  // one CTA finds where the kept ids of one row end
constexpr int kCutWarps = kCutThreads / 32;
constexpr int kCutSlotBits = 3;  // of a logit's bits are found in one pass over the row
constexpr int kCutSlots = 1 << kCutSlotBits;
static_assert(kCutSlots <= kCutWarps, "a warp adds up each slot");

constexpr int stats_ranges(int64_t vocabulary) {
  return static_cast<int>((vocabulary + kStatsRange - 1) / kStatsRange);
}

}  // namespace dllm::cuda
