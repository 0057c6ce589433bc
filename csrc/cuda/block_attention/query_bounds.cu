// The span bounds of every query tile, made once per call: tiles of keys find the queries that see them
// there.
#include "cuda/block_attention/launch.h"
#include "cuda/launch_kernel.h"
#include "cuda/tiles/sequence_spans.cuh"

namespace dllm::cuda {
namespace {

// A warp takes a tile.
__global__ void query_bounds_kernel(const BlockAttentionParams p, const BackwardWorkspace workspace) {
  const int tiles = (p.q_len + workspace.tile_queries - 1) / workspace.tile_queries;
  const int first = blockIdx.x % tiles * workspace.tile_queries;
  tile_bounds(SequenceSpans(p.spans, blockIdx.x / tiles, p.kv_len), first,
              min(p.q_len - first, workspace.tile_queries),
              workspace.bounds + static_cast<int64_t>(blockIdx.x) * kMaxSpanBounds);
}

}  // namespace

cudaError_t launch_query_bounds(const BlockAttentionParams& p, const BackwardWorkspace& workspace,
                                cudaStream_t stream) {
  return launch_ctas(query_bounds_kernel, workspace_bounds(p, workspace) / kMaxSpanBounds, 32, 0, stream, p,
                     workspace);
}

}  // namespace dllm::cuda
