// Accepts proposals by a rule (core/acceptance.h) and writes them into the canvas.
#pragma once

#include <cstdint>

#include "core/acceptance.h"

namespace dllm::cpu {

struct CommitParams {
  Rule rule;
  int64_t mask_id;
  int batch, candidates;
  int64_t canvas_stride;  // elements between rows of the canvas
  void* canvas;           // int64 or int32 [batch, length]
  bool canvas_is_int64;
  const int32_t* positions;             // [batch, candidates], −1: none
  const int64_t* token;                 // statistics, row b·candidates + c
  const void *prob, *margin, *entropy;  // float, or double as `float64` says
  const void* divergence;               // or null when the rule needs no stability
  bool float64;
  const int32_t* quota;         // [batch], or null when the rule has no quota
  const int32_t* step;          // [batch], null: 0
  const int32_t* sequence_ids;  // [batch], null: b
  uint64_t seed;
  int32_t* state;  // in and out [batch, length]: steps in a row that were stable; or null like divergence
  int64_t state_stride;
  bool* accepted;     // out [batch, candidates]
  int32_t* progress;  // out [batch, 2]: masks left among the listed positions, tokens changed; or null
};

// Rows [begin, end) of the batch.
void commit(const CommitParams& p, int64_t begin, int64_t end);

}  // namespace dllm::cpu
