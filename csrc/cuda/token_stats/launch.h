// Launches of the token_stats kernels: statistics of logits rows, as core/token_state.h defines them.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "cuda/token_stats/config.h"

namespace dllm::cuda {

// Rows that belong to a block of the canvas: row r is position block_start[r / block] + r % block of
// canvas row r / block. Rows whose position holds no mask are skipped.
struct MaskedBlocks {
  const void* canvas;  // int64 or int32 [batch, length]; null: every row is read
  bool canvas_is_int64;
  int64_t canvas_stride, length, mask_id;
  const int32_t* block_start;  // [batch]
  int32_t block;
  const int32_t* step;          // [batch], null: 0
  const int32_t* sequence_ids;  // [batch], null: the batch index
};

struct RowStatsParams : TokenStatsParams<ListedTokenIds> {  // states: token_stats_workspace() bytes
  MaskedBlocks blocks;
};

size_t token_stats_workspace(int64_t rows, int32_t vocabulary, bool float64);
cudaError_t token_stats(const RowStatsParams& params, cudaStream_t stream);

}  // namespace dllm::cuda
