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
  static constexpr int kTargetCtas = 128 * kCtas;                   // that the largest GPUs run at a time
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

// ---- splits
// About as many CTAs as have room on the largest GPUs at a time come out of one sequence; a split has enough
// keys to outweigh the writing and merging of its partial result.
constexpr int kMinKeyTiles = 4;

// Rows of a CTA, and CTAs to aim at.
struct SplitShape {
  int cta_rows, ctas;

  template <int kDim, bool kManyRows>
  static constexpr DLLM_HOST_DEVICE SplitShape of_tiles() {
    using Tiles = CachedTiles<kDim, kManyRows>;
    return {Tiles::kRows, Tiles::kTargetCtas};
  }
  // Of the kernel that a sequence of so many rows runs by itself.
  template <int kDim>
  static constexpr DLLM_HOST_DEVICE SplitShape of_rows(int64_t rows) {
    return CachedTiles<kDim, true>::fits(rows) ? of_tiles<kDim, true>() : of_tiles<kDim, false>();
  }
  static constexpr DLLM_HOST_DEVICE SplitShape of(int head_dim, int64_t rows) {
    return head_dim <= 128 ? of_rows<128>(rows) : of_rows<256>(rows);
  }
};
static_assert(SplitShape::of_rows<64>(64).cta_rows == SplitShape::of_rows<128>(64).cta_rows &&
              SplitShape::of_rows<64>(65).cta_rows == SplitShape::of_rows<128>(65).cta_rows);

// rows: the live queries times the heads of a group.
constexpr DLLM_HOST_DEVICE int split_count(int head_dim, int key_tiles, int kv_heads, int rows) {
  const SplitShape shape = SplitShape::of(head_dim, rows);
  const int row_tiles = rows <= shape.cta_rows ? 1 : (rows + shape.cta_rows - 1) / shape.cta_rows;
  const int wanted = shape.ctas / (kv_heads * row_tiles), most = key_tiles / kMinKeyTiles;
  const int splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits;
}
static_assert(split_count(128, 38 + 1, 32, 32) == 9 && split_count(128, 512 + 1, 32, 32) == 16,
              "32 heads, 32 queries");
static_assert(split_count(128, 512 + 1, 32, 64) == 8, "two blocks of them");
static_assert(split_count(128, 512 + 1, 8, 4 * 32) == 32, "four query heads to a kv head");
static_assert(split_count(64, 1 << 20, 1, 1) == 512 && split_count(256, 1 << 20, 1, 1) == 256 &&
              split_count(128, 0, 64, 1 << 20) == 1);

// Fewer live queries never have fewer splits: the most splits of a call are those of its fewest rows.
constexpr bool splits_fall_with_rows(int head_dim) {
  for (int rows = 1; rows < 512; rows++)
    if (split_count(head_dim, 1 << 20, 1, rows) < split_count(head_dim, 1 << 20, 1, rows + 1)) return false;
  return true;
}
static_assert(splits_fall_with_rows(64) && splits_fall_with_rows(128) && splits_fall_with_rows(256));

// Partial results of a sequence of up to `rows` rows, one for each split, kv head and row; those of rows that
// are not split need none.
constexpr int64_t partial_rows(int head_dim, int max_splits, int kv_heads, int64_t rows) {
  const SplitShape few = SplitShape::of(head_dim, 1), own = SplitShape::of(head_dim, rows);
  const int64_t of_few = int64_t{few.ctas} * few.cta_rows, of_own = int64_t{own.ctas} * own.cta_rows;
  const int64_t most = of_few < of_own ? of_own : of_few, all = max_splits * kv_heads * rows;
  return max_splits == 1 ? 0 : all < most ? all : most;
}
static_assert(partial_rows(128, 16, 32, 32) == 16 * 32 * 32 &&
              partial_rows(128, 32, 8, 128) == 32 * 8 * 128 &&
              partial_rows(128, 512, 1, 1 << 20) == 256 * 128);

// Of the kernels without tensor cores: a warp for each row.
constexpr int kCachedFp32Rows = 4;

// Counters of the CTAs that have finished, for one kv head: as many as the smallest CTAs need for these rows.
constexpr DLLM_HOST_DEVICE int64_t counters_of_head(int64_t rows) {
  return (rows + kCachedFp32Rows - 1) / kCachedFp32Rows;
}

}  // namespace dllm::cuda
