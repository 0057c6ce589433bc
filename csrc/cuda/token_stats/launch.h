// Launches of the token_stats kernels: statistics of logits rows, as core/token_state.h defines them.
#pragma once

#include <cuda_runtime_api.h>

#include <climits>
#include <cmath>

#include "cuda/logits.h"
#include "cuda/token_stats/config.h"

namespace dllm::cuda {

// Rows that belong to a block of the canvas: row r is position block_start[r / block] + r % block of
// canvas row r / block. Rows whose position holds no mask are skipped.
struct BlockRows {
  const void* canvas;  // int64 or int32 [batch, length]; null: every row is read
  bool canvas_is_int64;
  int64_t canvas_stride, length, mask_id;
  const int32_t* block_start;  // [batch]
  int64_t block;
  const int32_t* step;          // [batch], null: 0
  const int32_t* sequence_ids;  // [batch], null: the batch index
};

// What top-p and top-k leave of a row: x above `lowest`, and of those equal to it the ids up to `last_tie`.
struct TokenCut {
  float lowest = -HUGE_VALF;
  int32_t last_tie = INT32_MAX;
  int32_t fallback = -1;  // what is proposed where nothing that is left may be
};

struct TokenStatsParams {
  LogitsView logits;
  int64_t rows;
  int32_t vocabulary;
  bool float64;
  BlockRows block;

  float temperature;
  uint64_t seed;
  const int32_t* noise_ids;  // [rows, 3]: sequence, position, step; null: (0, row, 0)
  float confidence_scale;    // 1 / confidence temperature
  TokenIds suppress, proposal_exclude, confidence_exclude;
  int32_t fallback;  // the lowest id that may be proposed

  double top_p;    // 1: no such filter
  int32_t top_k;   // INT32_MAX: no such filter
  TokenCut* cuts;  // workspace [rows]; null: neither filter

  void* states;  // workspace of token_stats_workspace() bytes
  int64_t* token;
  void *prob, *margin, *entropy, *logsumexp;  // [rows], float or double as `float64` says
};

size_t token_stats_workspace(int64_t rows, int32_t vocabulary, bool float64);
cudaError_t token_stats(const TokenStatsParams& params, cudaStream_t stream);

}  // namespace dllm::cuda
