// cached_block_attention on the CPU: one work item is a tile of queries of one sequence and kv head.
#pragma once

#include "core/params.h"
#include "cpu/attention_forward.h"
#include "cpu/isa.h"

namespace dllm::cpu {

inline int64_t attention_items(const CachedAttentionParams& p) {
  return attention_items(p.batch, p.q_heads, p.kv_heads, p.q_len);
}

}  // namespace dllm::cpu

DLLM_CPU_KERNEL(cached_block_attention, CachedAttentionParams)
