// What a commit works on: plain data, filled by csrc/torch/unmask.h, read by the CPU and CUDA kernels alike.
#pragma once

#include <stdint.h>

#include "core/acceptance.h"

namespace dllm {

struct CommitParams {
  Rule rule;
  int64_t mask_id;
  int batch, candidates;
  int64_t canvas_stride, length;
  void* canvas;  // int64 or int32 [batch, length]
  bool canvas_is_int64;
  const int32_t* positions;             // [batch, candidates], outside the canvas: none
  const int32_t* block_start;           // [batch], where positions is null: candidate c is block_start[b] + c
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

}  // namespace dllm
