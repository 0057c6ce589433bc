// Tiles and shared memory of the block_attention kernels; host and device read the same numbers.
#pragma once

#include <stddef.h>

namespace dllm::cuda {

constexpr size_t kSmallestSharedMemory = 99 * 1024;  // that a CTA can have on every GPU from Ampere on
constexpr size_t kSmallStatics = 2 * 1024;           // bounds and visible keys come on top of these plans

// Forward on tensor cores: each of four warps owns 32 queries (16 of the largest head dim, for its registers'
// sake). Keys and values have one tile each: one is copied while the other is used. With 64 KiB two CTAs
// share a multiprocessor and cover each other's softmax and waits.
template <int kDim>
struct ForwardTiles {
  static constexpr int kThreads = 128;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;  // of 16 queries, to a warp
  static constexpr int kQueries = kThreads / 32 * 16 * kRowTiles;
  static constexpr int kKeys = 64;
  static constexpr size_t kSharedBytes = 2 * kDim * (kQueries + 2 * kKeys);
};
static_assert(ForwardTiles<256>::kSharedBytes + kSmallStatics <= kSmallestSharedMemory);

// The plain kernels, float32 arithmetic: 128 threads as 8 x 16, a thread owns 4 rows of the CTA's tile and,
// of what is multiplied with it, every 16th row and every 16th group of 4 dims. The 16 threads that share
// rows are half a warp.
constexpr int kPlainThreads = 128;
constexpr int kPlainRows = 32;
constexpr int kPlainRowThreads = 16;
constexpr int kPlainThreadRows = kPlainRows / (kPlainThreads / kPlainRowThreads);

// float32 words of a row in shared memory: the padding spreads 8 rows over all banks.
template <int kDim>
constexpr int kRowWords = kDim + 4;

// Queries, one tile for keys and then values, weights.
template <int kDim>
constexpr size_t kPlainForwardBytes =
    sizeof(float) * kPlainRows * (2 * kRowWords<kDim> + kRowWords<kPlainRows>);
static_assert(kPlainForwardBytes<256> + kSmallStatics <= kSmallestSharedMemory);

}  // namespace dllm::cuda
