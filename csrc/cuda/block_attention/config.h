// Tiles and shared memory of the block_attention kernels; host and device read the same numbers.
#pragma once

#include <stddef.h>

namespace dllm::cuda {

constexpr size_t kSmallestSharedMemory = 99 * 1024;  // that a CTA can have on every GPU from Ampere on
constexpr size_t kSmallStatics = 3 * 1024;           // bounds and visible keys come on top of these plans

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

constexpr int kTermLanes = 8;        // that sum up dO·O of a query
constexpr int kQueryMultiple = 128;  // of every tile's queries

// Gradients of queries: as the forward pass, with two tiles of keys and values each, and fewer of them:
// besides the sums there are two tiles of scores in registers.
template <int kDim>
struct QueryGradientTiles {
  static constexpr int kThreads = 128;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kQueries = kThreads / 32 * 16 * kRowTiles;
  static constexpr int kKeys = kDim <= 128 ? 32 : 16;
  static constexpr size_t kSharedBytes = 2 * kDim * (2 * kQueries + 4 * kKeys);
};

// Gradients of keys and values: each of four warps owns 16 keys. Of the largest head dim a CTA sums up a
// slice only, for the registers' sake.
template <int kDim>
struct KeyGradientTiles {
  static constexpr int kThreads = 128;
  static constexpr int kKeys = kThreads / 32 * 16;
  static constexpr int kQueries = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kSliceDim = kDim <= 128 ? kDim : 128;
  static constexpr size_t kSharedBytes = 2 * kDim * (2 * kKeys + 4 * kQueries);
};
static_assert(KeyGradientTiles<64>::kKeys <= 64, "one bit per key of the tile in a 64-bit mask");
static_assert(QueryGradientTiles<128>::kSharedBytes + kSmallStatics <= kSmallestSharedMemory);
static_assert(QueryGradientTiles<256>::kSharedBytes + kSmallStatics <= kSmallestSharedMemory);
static_assert(KeyGradientTiles<128>::kSharedBytes + kSmallStatics <= kSmallestSharedMemory);
static_assert(KeyGradientTiles<256>::kSharedBytes + kSmallStatics <= kSmallestSharedMemory);

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

// Rows of the other side that a plain backward kernel takes at a time.
template <int kDim>
constexpr int kPlainPartners = kDim <= 128 ? 32 : 16;

// Two tiles of the CTA's own rows, one of the other side's, P and dS.
template <int kDim>
constexpr size_t kPlainBackwardBytes =
    sizeof(float) * ((2 * kPlainRows + kPlainPartners<kDim>)*kRowWords<kDim> +
                     2 * kPlainRows * kRowWords<kPlainPartners<kDim>>);
static_assert(kPlainBackwardBytes<256> + kSmallStatics <= kSmallestSharedMemory);

}  // namespace dllm::cuda
