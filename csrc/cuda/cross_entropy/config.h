// Shape of the cross entropy kernels; host and device read the same numbers.
#pragma once

#include <cstdint>

namespace dllm::cuda {

constexpr int kRowThreads = 512;  // one CTA works on one row
constexpr int kRowWarps = kRowThreads / 32;
constexpr int kRowLoads = 4;           // 16-byte loads that a thread has in flight
constexpr int kSumThreads = 1024;      // of the one CTA that adds up the loss
constexpr int kReservedShared = 1024;  // static shared memory of the kernels, generously

// How much of a row stays in shared memory between the two times that its gradient needs it; what is beyond
// is read again, mostly from L2.
constexpr int64_t resident_bytes(int64_t row_bytes, int64_t shared_limit) {
  const int64_t most = (shared_limit - kReservedShared) / 16 * 16, whole = (row_bytes + 15) / 16 * 16;
  return whole < most ? whole : most;
}
static_assert(resident_bytes(2 * 32'000, 227 * 1024) == 64'000);  // three rows to a multiprocessor
static_assert(resident_bytes(2 * 126'464, 227 * 1024) == 227 * 1024 - 1024);  // nine tenths of the row

}  // namespace dllm::cuda
