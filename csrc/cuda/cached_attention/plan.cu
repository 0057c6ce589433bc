#include "cuda/cached_attention/sequence_keys.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"

namespace dllm::cuda {
namespace {

constexpr int kThreads = 128;

// A CTA for each sequence.
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const __grid_constant__ CachedAttentionParams p, const CachedPlan plan) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int64_t batch = blockIdx.x;
  const int counters = p.kv_heads * counters_of_head(p.q_len * (p.q_heads / p.kv_heads));
  for (int i = threadIdx.x; i < counters; i += kThreads) plan.counters[batch * counters + i] = 0;
  if (threadIdx.x >= 32) return;

  __shared__ SpanBounds bounds[kMaxSpanBounds];
  const int live = p.q_lengths ? min(max(p.q_lengths[batch], 0), p.q_len) : p.q_len;
  const SequenceSpans spans(p.cache_spans, batch, cached_positions(p));
  tile_bounds(spans, 0, spans.row_stride ? live : 1, bounds);
  __syncwarp();
  int begin = INT_MAX, end = 0;
  for (int r = 0; r < spans.bounds_count(); r++) {
    begin = min(begin, bounds[r].min_start);
    end = max(end, bounds[r].max_end);
  }
  if (live == 0) begin = end;
  const int first = begin < end ? begin / kCachedKeys * kCachedKeys : 0;
  const int tiles = begin < end ? (end - first + kCachedKeys - 1) / kCachedKeys : 0;
  if (threadIdx.x == 0) plan.sequences[batch] = {live, first, tiles, 0};
}

}  // namespace

cudaError_t launch_plan(const CachedAttentionParams& p, int32_t* data, cudaStream_t stream) {
  return launch_overlapping_ctas(plan_kernel, p.batch, kThreads, 0, stream, p, plan_at(data, p));
}

}  // namespace dllm::cuda
