// Shape of the commit kernel; host and device read the same numbers.
#pragma once

#include <cstddef>

namespace dllm::cuda {

constexpr int kCommitThreads = 256;
constexpr int kMaxCandidates = 4096;

// Shared memory of one canvas row: key, entropy, position and order of each candidate. At most 96 KB.
constexpr size_t commit_shared_bytes(int candidates, bool float64) {
  return candidates * (2 * (float64 ? sizeof(double) : sizeof(float)) + 2 * sizeof(int));
}

}  // namespace dllm::cuda
