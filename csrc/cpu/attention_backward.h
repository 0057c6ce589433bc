// Gradients of block_attention on the CPU. Either one pass, where a work item is all that belongs to one
// sequence and kv head (5 products), or two passes that compute scores twice (7 products), where an item is a
// range of keys or a tile of queries. Both sum in the order of queries and of keys: the same bits.
#pragma once

#include "core/params.h"
#include "cpu/attention_forward.h"
#include "cpu/isa.h"

namespace dllm::cpu {

constexpr int kGradientRowMultiple = 32;
constexpr int kGradientTileRows = 128;

inline __attribute__((always_inline)) int64_t key_ranges(const BlockAttentionBackwardParams& p) {
  return (p.forward.kv_len + p.keys_per_item - 1) / p.keys_per_item;
}

inline int64_t attention_items(const BlockAttentionBackwardParams& p) {
  const BlockAttentionParams& f = p.forward;
  const int64_t heads = static_cast<int64_t>(f.batch) * f.kv_heads;
  const int64_t tiles = attention_tiles(kGradientTileRows, f.q_heads / f.kv_heads, f.q_len);
  return p.keys_per_item == 0 ? heads : heads * (key_ranges(p) + tiles);
}

}  // namespace dllm::cpu

DLLM_CPU_KERNEL(block_attention_backward, BlockAttentionBackwardParams)
