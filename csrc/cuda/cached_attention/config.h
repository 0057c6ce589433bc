// Tiles of the cached_block_attention kernels, and how many CTAs share the keys of a sequence; host and
// device read the same numbers.
//
// A row's keys are a list of tiles: cached positions in tiles that start at multiples of kCachedKeys, then
// the fresh keys in such tiles. Split s of n takes tiles [tiles·s/n, tiles·(s + 1)/n) in their order, and the
// splits are merged in theirs. The list and n follow from the row's own spans and length and from the number
// of heads, not from the rest of the batch or the GPU: a row has the same bits in any company and on any
// number of multiprocessors.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "core/host_device.h"

namespace dllm::cuda {

constexpr int kCachedKeys = 32;  // of a tile: one bit of a word, one lane of a warp for each

// About as many CTAs as have room on the largest GPUs at a time come out of one sequence; a split has enough
// keys to outweigh the writing and merging of its partial result.
constexpr int kTargetTiles = 512;
constexpr int kSplitRows = 32;
constexpr int kMinKeyTiles = 4;

// rows: the live queries times the heads of a group.
DLLM_HOST_DEVICE constexpr int split_count(int key_tiles, int kv_heads, int rows) {
  const int row_tiles = rows <= kSplitRows ? 1 : (rows + kSplitRows - 1) / kSplitRows;
  const int wanted = kTargetTiles / (kv_heads * row_tiles), most = key_tiles / kMinKeyTiles;
  const int splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits;
}
static_assert(split_count(38 + 1, 32, 32) == 9 && split_count(512 + 1, 32, 32) == 16, "32 heads, 32 queries");
static_assert(split_count(512 + 1, 8, 4 * 32) == 16, "four query heads to a kv head");
static_assert(split_count(1 << 20, 1, 1) == kTargetTiles && split_count(0, 64, 1 << 20) == 1);

// Partial results of a sequence, one for each split, kv head and row; those of rows that are not split need
// none.
constexpr int64_t partial_rows(int max_splits, int kv_heads, int64_t rows) {
  const int64_t most = int64_t{kTargetTiles} * kSplitRows, all = max_splits * kv_heads * rows;
  return max_splits == 1 ? 0 : all < most ? all : most;
}
static_assert(partial_rows(16, 32, 32) == 16 * 32 * 32 && partial_rows(16, 8, 1 << 20) == 512 * 32);

// Of kernels on tensor cores: a few rows (one query head to a kv head and a block of queries), or many. Small
// CTAs cover each other's waits; large ones read keys and values once for more rows.
template <int kDim, bool kManyRows>
struct CachedTiles {
  static constexpr int kWarps = kManyRows ? 4 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kManyRows && kDim <= 128 ? 2 : 1;  // of 16 rows, to a warp
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kCtas = kManyRows || kDim > 128 ? 2 : 4;     // that a multiprocessor has registers for
  static constexpr bool kHoldsQueries = !kManyRows && kDim <= 128;  // in registers, else in shared memory
  static constexpr int kStages = kDim <= 64 ? 4 : kDim <= 128 ? 3 : 2;  // of keys and values under way
  // Rows that fill more than half of a large tile are many.
  static constexpr bool fits(int64_t rows) {
    return kManyRows == (rows > CachedTiles<kDim, true>::kRows / 2);
  }
  static constexpr size_t kSharedBytes = 2 * kDim * ((kHoldsQueries ? 0 : kRows) + kStages * 2 * kCachedKeys);
};
constexpr size_t kCachedStatics = 2 * 1024;  // bounds and visible keys come on top of these plans
static_assert(4 * (CachedTiles<128, false>::kSharedBytes + kCachedStatics) <= 227 * 1024,
              "four CTAs share it");
static_assert(CachedTiles<128, true>::kSharedBytes + kCachedStatics <= 99 * 1024,
              "fits every GPU from Ampere on");
static_assert(CachedTiles<256, true>::kSharedBytes + kCachedStatics <= 99 * 1024);

// Of the kernels without tensor cores: a warp for each row.
constexpr int kCachedPlainRows = 4;
constexpr int kMergeRows = 4;

}  // namespace dllm::cuda
