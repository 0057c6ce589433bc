// Tiles, shared memory and work order of the Hopper block_attention kernels; host and device read the same
// numbers.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "core/params.h"
#include "cuda/sm90/limits.h"
#include "cuda/sm90/matrix_descriptor.h"

namespace dllm::cuda::sm90 {

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
  static constexpr size_t kSharedBytes = kPanelAlignment + 2 * kDim * (kQueries + 2 * kStages * kKeys);
  static constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
  static_assert(can_divide_registers(kProducerRegisters, kConsumerRegisters, kConsumers));
};
static_assert(ForwardTiles<128>::kSharedBytes + kSmallStatics <= kMaxSharedBytes);

// Gradients of queries: as the forward pass, but scores and their gradients come tile by tile together.
template <int kDim>
struct BackwardDqTiles {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kKeys = 64;
  static constexpr int kStages = 4;
  static constexpr size_t kSharedBytes = kPanelAlignment + 2 * kDim * (2 * kQueries + 2 * kStages * kKeys);
  static constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
  static_assert(can_divide_registers(kProducerRegisters, kConsumerRegisters, kConsumers));
};
static_assert(BackwardDqTiles<128>::kSharedBytes + kSmallStatics <= kMaxSharedBytes);

constexpr int kDkvQueries = 64;  // of a tile that gradients of keys take in

// Gradients of keys and values: each multiplying warpgroup owns 64 keys. Registers of a thread: kDim sums, 32
// scores, 32 gradients of scores, both packed once more.
template <int kDim>
struct BackwardDkvTiles {
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kKeys = 64 * kConsumers;
  static constexpr int kQueries = kDkvQueries;
  static constexpr int kStages = 3;
  static constexpr size_t kSharedBytes = kPanelAlignment + 2 * kDim * (2 * kKeys + 2 * kStages * kQueries);
  static constexpr size_t kStaticBytes = 8 * 1024;  // terms and visible keys of every stage besides
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(can_divide_registers(kProducerRegisters, kConsumerRegisters, kConsumers));
};
static_assert(BackwardDkvTiles<128>::kSharedBytes + BackwardDkvTiles<128>::kStaticBytes <= kMaxSharedBytes);

// The tiles of all heads in the order in which CTAs take them: of as many (sequence, head) pairs as the L2
// cache keeps keys and values of, the last tiles first. In masks of this field later queries see more, so
// long tiles come before short ones.
struct WorkOrder {
  int tiles, heads, pairs, pairs_together;

  struct Item {
    int batch, head, tile;
  };
  constexpr DLLM_HOST_DEVICE int items() const { return tiles * pairs; }
  // Whether all indices are numbers of 32 bits.
  bool is_countable() const { return int64_t{tiles} * pairs <= INT32_MAX / 2; }
  constexpr DLLM_HOST_DEVICE Item item(int index) const {
    const int first = index / (tiles * pairs_together) * pairs_together;
    const int together = pairs - first < pairs_together ? pairs - first : pairs_together;
    const int rest = index - first * tiles;
    const int pair = first + rest % together;
    return {pair / heads, pair % heads, tiles - 1 - rest / together};
  }
  // What CTA `cta` of `ctas` takes in each round: forth and back, so that none always gets the longer ones.
  // At or beyond items() there is none.
  static constexpr DLLM_HOST_DEVICE int index(int round, int cta, int ctas) {
    return round * ctas + (round % 2 ? ctas - 1 - cta : cta);
  }
};

constexpr int64_t kCachedBytes = int64_t{32} << 20;  // that tiles of `pairs_together` read besides their own

// Tiles of `tile` of `length` positions of `heads` heads; every `sharing` heads read the same `rows` rows of
// 4 · head_dim bytes.
inline WorkOrder work_order(const BlockAttentionParams& p, int length, int tile, int heads, int sharing,
                            int64_t rows) {
  const int64_t bytes = rows * 4 * p.head_dim;
  const int64_t together = (kCachedBytes / bytes > 0 ? kCachedBytes / bytes : 1) * sharing;
  const int64_t pairs = int64_t{p.batch} * heads;
  return {(length + tile - 1) / tile, heads, static_cast<int>(pairs),
          static_cast<int>(together < pairs ? together : pairs)};
}
inline WorkOrder query_order(const BlockAttentionParams& p, int tile) {
  return work_order(p, p.q_len, tile, p.q_heads, p.q_heads / p.kv_heads, p.kv_len);
}
inline WorkOrder key_order(const BlockAttentionParams& p, int tile) {
  return work_order(p, p.kv_len, tile, p.kv_heads, 1, int64_t{p.q_len} * (p.q_heads / p.kv_heads));
}

}  // namespace dllm::cuda::sm90
