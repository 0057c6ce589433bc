// Shape of the token_stats kernels; host and device read the same numbers.
#pragma once

#include <cstdint>

namespace dllm::cuda {

constexpr int kStatsThreads = 256;
constexpr int kStatsWarps = kStatsThreads / 32;
// One CTA reads this many token ids of one row. The cut depends on the vocabulary alone, and ranges merge
// in order, so a row's result does not depend on how many rows there are.
constexpr int kStatsRange = 16384;

constexpr int kFilterThreads = 512;  // one CTA finds where the kept ids of one row end
constexpr int kFilterWarps = kFilterThreads / 32;
constexpr int kFilterSlotBits = 3;  // of a logit's bits are found in one pass over the row
constexpr int kFilterSlots = 1 << kFilterSlotBits;
static_assert(kFilterSlots <= kFilterWarps, "a warp adds up each slot");

constexpr int stats_ranges(int64_t vocabulary) {
  return static_cast<int>((vocabulary + kStatsRange - 1) / kStatsRange);
}

}  // namespace dllm::cuda
