// Tiles and shared memory of the block_attention kernels on tensor cores by mma.sync, for every GPU from
// Ampere on; host and device read the same numbers.
#pragma once

#include "cuda/block_attention/config.h"

namespace dllm::cuda::sm80 {

// Forward: each of four warps owns 32 queries (16 of the largest head dim, for its registers'
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

// Gradients of queries: as the forward pass, with two tiles of keys and values each, and fewer of them:
// besides the sums there are two tiles of scores in registers.
template <int kDim>
struct BackwardDqTiles {
  static constexpr int kThreads = 128;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kQueries = kThreads / 32 * 16 * kRowTiles;
  static constexpr int kKeys = kDim <= 128 ? 32 : 16;
  static constexpr size_t kSharedBytes = 2 * kDim * (2 * kQueries + 4 * kKeys);
};

// Gradients of keys and values: each of four warps owns 16 keys. Of the largest head dim a CTA sums up a
// slice only, for the registers' sake.
template <int kDim>
struct BackwardDkvTiles {
  static constexpr int kThreads = 128;
  static constexpr int kKeys = kThreads / 32 * 16;
  static constexpr int kQueries = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kSliceDim = kDim <= 128 ? kDim : 128;
  static constexpr size_t kSharedBytes = 2 * kDim * (2 * kKeys + 4 * kQueries);
};
static_assert(BackwardDkvTiles<64>::kKeys <= 64, "one bit per key of the tile in a 64-bit mask");
static_assert(BackwardDqTiles<128>::kSharedBytes + kSmallStatics <= kSmallestSharedMemory);
static_assert(BackwardDqTiles<256>::kSharedBytes + kSmallStatics <= kSmallestSharedMemory);
static_assert(BackwardDkvTiles<128>::kSharedBytes + kSmallStatics <= kSmallestSharedMemory);
static_assert(BackwardDkvTiles<256>::kSharedBytes + kSmallStatics <= kSmallestSharedMemory);

}  // namespace dllm::cuda::sm80
