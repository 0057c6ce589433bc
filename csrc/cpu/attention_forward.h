// block_attention on the CPU: one work item is a tile of queries of one sequence and kv head.
#pragma once

#include "core/params.h"
#include "cpu/isa.h"

namespace dllm::cpu {

// Query rows of a tile: 32 positions with all heads of their group, as far as 128 rows go. The same
// for every instruction set and thread count.
inline __attribute__((always_inline)) int attention_tile_rows(int group) {
  return group < 4 ? 32 * group : 128;
}

// Of `size` rows, of one sequence and kv head.
inline __attribute__((always_inline)) int64_t attention_tiles(int size, int64_t group, int64_t q_len) {
  return (q_len * group + size - 1) / size;
}

inline int64_t attention_items(int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t q_len) {
  const int64_t group = q_heads / kv_heads;
  return batch * kv_heads * attention_tiles(attention_tile_rows(static_cast<int>(group)), group, q_len);
}

inline int64_t attention_items(const BlockAttentionParams& p) {
  return attention_items(p.batch, p.q_heads, p.kv_heads, p.q_len);
}

}  // namespace dllm::cpu

DLLM_CPU_KERNEL(block_attention_forward, BlockAttentionParams)
