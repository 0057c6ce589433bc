// cached_block_attention on the CPU: tiles of queries of one sequence and kv head, and ranges of cached keys.
// A range has a softmax of its own, whoever computes it, and ranges are merged in their order: with few tiles
// and many cached keys threads share the ranges of a tile, and change no bit.
#pragma once

#include "core/params.h"
#include "cpu/attention_forward.h"
#include "cpu/isa.h"

namespace dllm::cpu {

struct CachedAttentionItems : CachedAttentionParams {
  float* states;  // of every range of every tile, state_floats() each; null: a tile is one work item

  static constexpr int kRangeKeys = 1024;
  static constexpr int kMostPanel = 32;  // queries of a panel, with any instruction set
  // The first range has the fresh keys too.
  int ranges() const {
    const int64_t keys = int64_t{table_length} * page_size;
    return keys <= kRangeKeys ? 1 : static_cast<int>((keys + kRangeKeys - 1) / kRangeKeys);
  }
  int64_t tiles() const { return attention_items(batch, q_heads, kv_heads, q_len); }
  int64_t items() const { return states ? tiles() * ranges() : tiles(); }
  int64_t state_floats() const {
    const int rows = attention_tile_rows(q_heads / kv_heads);
    return int64_t{(rows + kMostPanel - 1) / kMostPanel * kMostPanel} * (head_dim + 2);
  }
};

}  // namespace dllm::cpu

// Work items: tiles, or (tile, range) where there are `states` to fill.
DLLM_CPU_KERNEL(cached_block_attention, CachedAttentionItems)
// Work items: tiles. Merges the states of their ranges.
DLLM_CPU_KERNEL(merge_cached_attention, CachedAttentionItems)
