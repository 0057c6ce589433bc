// Launches of the cached_block_attention kernels on a stream: partial results of the splits, then their
// merge. Float strides and pointers are multiples of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "core/softmax_state.h"

namespace dllm::cuda {

// Sums and states of rows whose keys are split; partial_rows(...) of config.h for each sequence.
struct SplitParams {
  CachedAttentionParams attention;
  int32_t max_splits;
  int64_t partial_rows;  // of a sequence
  float* sums;           // [batch, partial_rows, head_dim]
  float2* states;        // [batch, partial_rows] max and sum
};

// max_splits and partial_rows, from maximum lengths.
void plan_splits(SplitParams& p);

cudaError_t launch_cached_attention(const SplitParams& p, cudaStream_t stream);

// One kernel for each 16-bit type, padded head dim and number of rows (instantiations/tiles_*.cu), one for
// float32, and the merge of each type's.
template <class T, int kDim, bool kManyRows>
cudaError_t launch_cached_tiles(const SplitParams& p, cudaStream_t stream);
cudaError_t launch_cached_fp32(const SplitParams& p, cudaStream_t stream);
template <class T>
cudaError_t launch_merge(const SplitParams& p, cudaStream_t stream);

}  // namespace dllm::cuda
