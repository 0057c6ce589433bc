// Launches of the token_stats kernels: statistics of logits rows, as core/token_state.h defines them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/token_stats/config.h"

namespace dllm::cuda {

enum class LogitType { float32, bfloat16, float16 };

// Token ids travel as kernel arguments: no copy to the device, constant in a captured graph.
constexpr int kMaxListedIds = 64;
struct TokenIds {
  int count;
  int32_t ids[kMaxListedIds];  // ascending
};

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

struct TokenStatsParams {
  // Row r starts at logits + (r / inner) · outer_stride + (r % inner) · inner_stride.
  const void* logits;
  LogitType type;
  int64_t rows, inner, outer_stride, inner_stride;
  int32_t vocabulary;
  bool float64;
  BlockRows block;

  float temperature;
  uint64_t seed;
  const int32_t* noise_ids;  // [rows, 3]: sequence, position, step; null: (0, row, 0)
  float confidence_scale;    // 1 / confidence temperature
  TokenIds suppress, proposal_exclude, confidence_exclude;
  int32_t fallback;  // the lowest id that may be proposed

  void* states;  // workspace of token_stats_workspace() bytes
  int64_t* token;
  void *prob, *margin, *entropy, *logsumexp;  // [rows], float or double as `float64` says
};

size_t token_stats_workspace(int64_t rows, int32_t vocabulary, bool float64);
cudaError_t token_stats(const TokenStatsParams& params, cudaStream_t stream);

}  // namespace dllm::cuda
