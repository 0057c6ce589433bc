// Launches of the cached_block_attention kernels on a stream: a plan of every sequence's keys, then
// attention, in which the CTA that finishes last merges the partial results of splits. Float strides and
// pointers are multiples of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "core/softmax_state.h"

namespace dllm::cuda {

// What a plan says of one sequence: live queries, the first cached key of its list of tiles, and its cached
// tiles.
struct alignas(16) PlannedSequence {
  int32_t live, first_cached, cached_tiles, unused;
};

// One buffer: the sequences, then the counters of CTAs that have finished. Every launch finds the counters 0
// and leaves them so, and a plan serves all layers of a forward, one after the other. A launch that breaks
// off leaves its plan unusable, and no other: nothing outlives the forward.
struct CachedPlan {
  PlannedSequence* sequences;  // [batch]
  unsigned* counters;          // [batch, kv_heads, counters_of_head(rows of a kv head)]
};

// By what queries and fresh keys are rotated on their way in, see RotateHalfParams. cos is null: they are
// not.
struct Rotation {
  const void *cos, *sin;  // [batch or 1, q_len, head_dim]
  int64_t cos_batch_stride, cos_position_stride, sin_batch_stride, sin_position_stride;  // batch of 1: 0
};

// Where fresh keys, rotated, and values are left. No slot that is written may be seen in the cache.
struct FreshWrites {
  const int32_t* positions;  // [batch, q_len], -1: nowhere; null: nothing is written
  void *cache_k, *cache_v;   // those of the attention
};

// Whether the kernels rotate and write themselves.
bool takes_fresh_tokens(DType dtype, int64_t head_dim, bool rotates);

// Sums and states of rows whose keys are split; partial_rows(...) of config.h for each sequence.
struct SplitParams {
  CachedAttentionParams attention;
  CachedPlan plan;
  Rotation rotation{};   // of kernels that take_fresh_tokens, like
  FreshWrites writes{};  // these
  int32_t max_splits;
  int64_t partial_rows;  // of a sequence
  float* sums;           // [batch, partial_rows, head_dim]
  float2* states;        // [batch, partial_rows] max and sum
};

// max_splits and partial_rows, from maximum lengths.
void plan_splits(SplitParams& p);

// int32 values of a plan.
int64_t plan_size(const CachedAttentionParams& p);
CachedPlan plan_at(int32_t* data, const CachedAttentionParams& p);
// Makes a plan at `data`, aligned to 16 bytes; of `p` the sizes, spans and lengths are read.
cudaError_t launch_plan(const CachedAttentionParams& p, int32_t* data, cudaStream_t stream);

// Attention by p.plan.
cudaError_t launch_cached_attention(const SplitParams& p, cudaStream_t stream);

// One kernel for each 16-bit type, padded head dim and number of rows (instantiations/tiles_*.cu), and one
// for float32.
template <class T, int kDim, bool kManyRows>
cudaError_t launch_cached_tiles(const SplitParams& p, cudaStream_t stream);
cudaError_t launch_cached_fp32(const SplitParams& p, cudaStream_t stream);

}  // namespace dllm::cuda
