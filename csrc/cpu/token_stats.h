// Statistics of logits rows: proposal and confidence in one pass (SEMANTICS of decoding in
// core/token_state.h).
#pragma once

#include <cstdint>

#include "core/token_state.h"
#include "cpu/isa.h"

namespace dllm::cpu {

enum class LogitType { float32, bfloat16, float16 };

// Token ids, ascending and distinct.
struct TokenIds {
  const int32_t* ids;
  int count;
};

struct TokenStatsParams {
  // Row r of the `rows` listed ones starts at logits + (r / inner) · outer_stride + (r % inner) ·
  // inner_stride.
  const void* logits;
  LogitType type;
  int64_t inner, outer_stride, inner_stride;
  int32_t vocabulary;
  const int64_t* rows;  // which rows to visit
  bool float64;         // softmax in double; noise and scores stay float

  float temperature;            // > 0 adds temperature · Gumbel noise to the score
  uint64_t seed;                // key of the noise
  const int32_t* noise_ids;     // [rows, 3]: sequence, position, step
  float confidence_scale;       // 1 / confidence temperature
  TokenIds suppress;            // −inf before both
  TokenIds proposal_exclude;    // barred from the proposal only
  TokenIds confidence_exclude;  // left out of the softmax only
  int32_t fallback;             // the lowest id that may be proposed

  // A row is cut into ranges of kRange ids, so that one row keeps several threads busy; the cut depends
  // on nothing but the vocabulary, and ranges merge in order, so results don't depend on threads.
  static constexpr int32_t kRange = 1 << 16;
  int32_t ranges() const { return (vocabulary + kRange - 1) / kRange; }
  void* states;  // TokenState<float or double> [visited rows, ranges]

  // Outputs, indexed by row; float or double as `float64` says.
  int64_t* token;
  void *prob, *margin, *entropy, *logsumexp;
};

}  // namespace dllm::cpu

// Work items: (visited row, range). Fills `states`.
DLLM_CPU_KERNEL(token_states, TokenStatsParams)
// Work items: visited rows. Merges `states` into the outputs.
DLLM_CPU_KERNEL(token_results, TokenStatsParams)
