// Launches of the block_attention kernels on a stream; float strides and pointers are multiples of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "core/span_mask.h"

namespace dllm::cuda {

cudaError_t launch_block_attention(const BlockAttentionParams& p, cudaStream_t stream);

// What the backward kernels hand to each other.
struct BackwardWorkspace {
  float2* terms;       // [batch, q_heads, padded_queries], see backward_preprocess.cuh
  SpanBounds* bounds;  // [batches of the spans, query tiles, kMaxSpanBounds]; not used without spans
  int padded_queries;  // a multiple of every tile's queries
  int tile_queries;    // of the tiles that `bounds` speak of
};

// The sizes; `terms` and `bounds` are for the caller to fill in, with memory of these many elements.
BackwardWorkspace backward_workspace(const BlockAttentionBackwardParams& p);
int64_t workspace_terms(const BlockAttentionParams& p, const BackwardWorkspace& workspace);
int64_t workspace_bounds(const BlockAttentionParams& p, const BackwardWorkspace& workspace);

cudaError_t launch_block_attention_backward(const BlockAttentionBackwardParams& p,
                                            const BackwardWorkspace& workspace, cudaStream_t stream);

// The backward pass begins with these two: the bounds of every query tile, and what of every query enters dS.
cudaError_t launch_query_bounds(const BlockAttentionParams& p, const BackwardWorkspace& workspace,
                                cudaStream_t stream);
template <class T>
cudaError_t launch_backward_preprocess(const BlockAttentionBackwardParams& p,
                                       const BackwardWorkspace& workspace, cudaStream_t stream);

}  // namespace dllm::cuda
