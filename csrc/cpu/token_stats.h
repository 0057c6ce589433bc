// Statistics of rows of logits: proposal and confidence in one pass over them (core/token_state.h).
#pragma once

#include <cstdint>

#include "core/params.h"
#include "core/token_state.h"
#include "cpu/isa.h"

namespace dllm::cpu {

// What is known of a row from some consecutive ids.
template <class Real>
struct PartState {
  TokenState<Real> state;
  Real x = -HUGE_VALF;  // of the proposal; −inf where it is outside the softmax
};

// A row is cut into parts that depend on nothing but the vocabulary and merge in order, so that results don't
// depend on threads.
struct PartedStatsParams : TokenStatsParams<TokenIds> {  // states: PartState<Real> [visited rows, parts]
  const int64_t* visited;                                // which of the rows are worked on; null: all
  int32_t parts;

  DLLM_HOST_DEVICE int64_t row(int64_t visit) const { return visited ? visited[visit] : visit; }
};

constexpr int32_t kLogitsPart = 1 << 16;  // ids of a part of stored logits

}  // namespace dllm::cpu

// Work items: (visited row, part). Fills `states`.
DLLM_CPU_KERNEL(token_states, PartedStatsParams)
// Work items: visited rows. Fills `cuts` from their `states` without any filter.
DLLM_CPU_KERNEL(token_cuts, PartedStatsParams)
// Work items: visited rows. Merges `states` into the outputs.
DLLM_CPU_KERNEL(token_results, PartedStatsParams)
