// Tiles and shared memory of the block_attention kernel; host and device read the same numbers.
#pragma once

#include <stddef.h>

namespace dllm::cuda {

// 128 threads as 8 x 16: a thread owns 4 queries and, of a tile, every 16th key and every 16th group of
// 4 output dims. The 16 threads that share queries are half a warp.
constexpr int kQueries = 32;
constexpr int kKeys = 32;
constexpr int kThreads = 128;
constexpr int kRowThreads = 16;
constexpr int kThreadQueries = kQueries / (kThreads / kRowThreads);
constexpr int kThreadKeys = kKeys / kRowThreads;

// float32 words of a row in shared memory: the padding spreads 8 rows over all banks.
template <int kDim>
constexpr int kRowWords = kDim + 4;

// Queries, one buffer for keys and then values, weights.
template <int kDim>
constexpr size_t kSharedBytes =
    sizeof(float) * ((kQueries + kKeys) * kRowWords<kDim> + kQueries * kRowWords<kKeys>);
static_assert(kSharedBytes<256> <= 99 * 1024, "fits every GPU from Ampere on");
static_assert(kKeys == 32, "one bit per key in a 32-bit mask");
static_assert(kQueries == 32, "one lane per query while span bounds are taken");

}  // namespace dllm::cuda
