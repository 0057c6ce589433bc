// Shape of the token_stats kernels; host and device read the same numbers.
#pragma once

#include <cstdint>

namespace dllm::cuda {

constexpr int kStatsThreads = 256;
// One CTA reads this many token ids of one row. The cut depends on the vocabulary alone, and ranges merge
// in order, so a row's result does not depend on how many rows there are.
constexpr int kStatsRange = 16384;
// 16-byte loads that a thread has in flight where it does little else than wait for them.
constexpr int kStatsLoads = 4;

constexpr int stats_ranges(int64_t vocabulary) {
  return static_cast<int>((vocabulary + kStatsRange - 1) / kStatsRange);
}

}  // namespace dllm::cuda
