// Statistics of rows of logits: proposal and confidence in one pass over them (core/token_state.h).
#pragma once

#include <climits>
#include <cstdint>

#include "core/params.h"
#include "core/token_state.h"
#include "cpu/isa.h"

namespace dllm::cpu {

// Token ids, ascending and distinct.
struct TokenIds {
  const int32_t* ids;
  int count;
};

// What top-p and top-k leave of a row: x above `lowest`, and of those equal to it the ids up to `last_tie`.
struct Cut {
  float lowest = -HUGE_VALF;
  int32_t last_tie = INT32_MAX;
  int32_t fallback = -1;  // what is proposed where nothing that is left may be
};

// What is known of a row from some consecutive ids.
template <class Real>
struct PartState {
  TokenState<Real> state;
  Real x = -HUGE_VALF;  // of the proposal; −inf where it is outside the softmax
};

// What is asked of every row, and where it goes.
struct TokenStatsParams {
  int32_t vocabulary;
  bool float64;         // softmax in double; noise and scores stay float
  const int64_t* rows;  // which rows to visit; null: all

  float temperature;            // > 0 adds temperature · Gumbel noise to the score
  uint64_t seed;                // key of the noise
  const int32_t* noise_ids;     // [rows, 3]: sequence, position, step; null: (0, row, 0)
  double confidence_scale;      // 1 / confidence temperature; statistics in float take it in float
  TokenIds suppress;            // −inf before both
  TokenIds proposal_exclude;    // barred from the proposal only
  TokenIds confidence_exclude;  // left out of the softmax only
  const Cut* cuts;              // [visited rows]; null: no filter
  int32_t fallback;             // the lowest id that may be proposed

  // A row is cut into parts that depend on nothing but the vocabulary and merge in order, so that results
  // don't depend on threads.
  int32_t parts;
  void* states;  // PartState<float or double> [visited rows, parts]

  // Outputs, indexed by row; float or double as `float64` says.
  int64_t* token;
  void *prob, *margin, *entropy, *logsumexp;

  DLLM_HOST_DEVICE int64_t row(int64_t visited) const { return rows ? rows[visited] : visited; }
};

// Row r starts at data + (r / inner) · outer_stride + (r % inner) · inner_stride.
struct LogitsView {
  const void* data;
  DType type;
  int64_t inner, outer_stride, inner_stride;

  DLLM_HOST_DEVICE int64_t offset(int64_t row) const {
    return row / inner * outer_stride + row % inner * inner_stride;
  }
};

struct LogitsStatsParams : TokenStatsParams {
  LogitsView logits;

  static constexpr int32_t kPart = 1 << 16;  // ids
};

struct TokenCutParams : LogitsStatsParams {
  double top_p;   // 1: no such filter
  int32_t top_k;  // INT32_MAX: no such filter
  Cut* result;    // [visited rows]
};

}  // namespace dllm::cpu

// Work items: (visited row, part). Fills `states`.
DLLM_CPU_KERNEL(token_states, LogitsStatsParams)
// Work items: visited rows. What top-p and top-k leave of them, from their `states` without any filter.
DLLM_CPU_KERNEL(token_cuts, TokenCutParams)
// Work items: visited rows. Merges `states` into the outputs.
DLLM_CPU_KERNEL(token_results, TokenStatsParams)
