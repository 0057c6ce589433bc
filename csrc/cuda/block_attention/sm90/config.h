// Tiles, shared memory and work order of the Hopper block_attention kernels; host and device read the same
// numbers.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "core/params.h"
#include "cuda/sm90/matrix_descriptor.h"

namespace dllm::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kSmallStatics = 1024;  // barriers and bounds come on top of these plans

// Forward: one warpgroup fetches, two multiply, 64 queries each. Registers of a thread: 64 scores, 32 packed
// weights, kDim / 2 sums.
template <int kDim>
struct ForwardTiles {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kQueryBytes = kPanels * panel_bytes(kQueries);
  static constexpr int kKeyBytes = kPanels * panel_bytes(kKeys);
  static constexpr size_t kSharedBytes = kPanelAlignment + kQueryBytes + 2 * kStages * kKeyBytes;
  static constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;

  static_assert(kDim % kPanelColumns == 0);
  static_assert(kQueryBytes % kPanelAlignment == 0 && kKeyBytes % kPanelAlignment == 0);
  static_assert(kSharedBytes + kSmallStatics <= kMaxSharedBytes);
  static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 64 * 1024);
};

// The tiles of all heads in the order in which CTAs take them: of as many (sequence, head) pairs as the L2 cache
// keeps keys and values of, the last tiles first. In masks of this field later queries see more, so long tiles
// come before short ones.
struct WorkOrder {
  int tiles, q_heads, pairs, pairs_together;

  struct Item {
    int batch, head, tile;
  };
  constexpr DLLM_HOST_DEVICE int items() const { return tiles * pairs; }
  constexpr DLLM_HOST_DEVICE Item item(int index) const {
    const int first = index / (tiles * pairs_together) * pairs_together;
    const int together = pairs - first < pairs_together ? pairs - first : pairs_together;
    const int rest = index - first * tiles;
    const int pair = first + rest % together;
    return {pair / q_heads, pair % q_heads, tiles - 1 - rest / together};
  }
  // What CTA `cta` of `ctas` takes in each round: forth and back, so that none always gets the longer ones. At or
  // beyond items() there is none.
  static constexpr DLLM_HOST_DEVICE int index(int round, int cta, int ctas) {
    return round * ctas + (round % 2 ? ctas - 1 - cta : cta);
  }
};

constexpr int64_t kCachedBytes = int64_t{32} << 20;  // of keys and values, at most

inline WorkOrder work_order(const BlockAttentionParams& p, int tile_queries) {
  const int shared_by = p.q_heads / p.kv_heads;
  const int64_t bytes = int64_t{4} * p.kv_len * p.head_dim;  // of one kv head
  const int64_t fitting = kCachedBytes / bytes > 0 ? kCachedBytes / bytes : 1;
  const int64_t pairs = int64_t{p.batch} * p.q_heads, together = fitting * shared_by;
  return {(p.q_len + tile_queries - 1) / tile_queries, p.q_heads, static_cast<int>(pairs),
          static_cast<int>(together < pairs ? together : pairs)};
}

}  // namespace dllm::cuda::sm90
