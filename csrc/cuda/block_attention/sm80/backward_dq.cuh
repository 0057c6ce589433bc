// Gradients of queries on tensor cores: a CTA owns a tile of queries of one head and takes in the keys they
// see, as in the forward pass: dq = scale dS k.
#pragma once

#include "cuda/block_attention/sm80/config.h"
#include "cuda/block_attention/sm80/launch.h"
#include "cuda/block_attention/sm80/score_gradients.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/tiles/head_pointer.cuh"
#include "cuda/tiles/online_softmax.cuh"
#include "cuda/tiles/sequence_spans.cuh"
#include "cuda/tiles/shared_tile.cuh"

namespace dllm::cuda::sm80 {

template <class T, int kDim>
__global__ void __launch_bounds__(BackwardDqTiles<kDim>::kThreads, 2)
    backward_dq_kernel(const BlockAttentionBackwardParams p, const BackwardWorkspace workspace) {
  using Tiles = BackwardDqTiles<kDim>;
  constexpr int kThreads = Tiles::kThreads, kQueries = Tiles::kQueries, kKeys = Tiles::kKeys;
  constexpr int kRowTiles = Tiles::kRowTiles;
  const BlockAttentionParams& f = p.forward;

  // ---- shared memory plan
  const SharedTile<T, kDim> queries{dynamic_shared<T>()};  // then their gradients
  const SharedTile<T, kDim> grads{queries.data + kQueries * kDim};
  T* stages = grads.data + kQueries * kDim;  // twice keys and values
  const auto keys = [&](int stage) { return SharedTile<T, kDim>{stages + 2 * stage * kKeys * kDim}; };
  const auto values = [&](int stage) { return SharedTile<T, kDim>{keys(stage).data + kKeys * kDim}; };
  alignas(16) __shared__ float2 terms[kQueries];
  __shared__ SpanBounds bounds[kMaxSpanBounds];
  __shared__ VisibleKeys<kQueries, kThreads, uint32_t> visible[2];
  static_assert(kKeys <= 32 && sizeof(terms) + sizeof(bounds) + sizeof(visible) <= kSmallStatics);

  // ---- which queries
  const int tiles = (f.q_len + kQueries - 1) / kQueries;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * kQueries;  // longest first
  const int head = blockIdx.x / tiles % f.q_heads;
  const int64_t batch = blockIdx.x / tiles / f.q_heads;
  const int kv_head = head / (f.q_heads / f.kv_heads);
  const int live = min(f.q_len - first, kQueries);
  const T* q = head_pointer<T>(f.q, f.q_layout, batch, head) + first * f.q_layout.position_stride;
  const T* grad_out =
      head_pointer<T>(p.grad_out, p.grad_out_layout, batch, head) + first * p.grad_out_layout.position_stride;
  const T* k = head_pointer<T>(f.k, f.k_layout, batch, kv_head);
  const T* v = head_pointer<T>(f.v, f.v_layout, batch, kv_head);
  const SequenceSpans spans(f.spans, batch, f.kv_len);
  const auto all_visible = [](KeyRange range) { return range.full && range.end - range.begin == kKeys; };

  const auto copy_keys = [&](KeyRange range, int stage) {
    if (range.begin < range.end) {
      uint32_t seen = ~0u;
      if (!all_visible(range))
        seen =
            visible[stage].mark([&](int i) { return i < live ? spans.visible_keys(first + i, range) : 0; });
      keys(stage).template copy_rows<kThreads, kKeys>(f.head_dim, [&](int i) {
        return seen >> i & 1 ? k + (range.begin + i) * f.k_layout.position_stride : nullptr;
      });
      values(stage).template copy_rows<kThreads, kKeys>(f.head_dim, [&](int i) {
        return seen >> i & 1 ? v + (range.begin + i) * f.v_layout.position_stride : nullptr;
      });
    }
    cp_async_commit_group();
  };
  queries.template copy_rows<kThreads, kQueries>(
      f.head_dim, [&](int i) { return i < live ? q + i * f.q_layout.position_stride : nullptr; });
  grads.template copy_rows<kThreads, kQueries>(f.head_dim, [&](int i) {
    return i < live ? grad_out + i * p.grad_out_layout.position_stride : nullptr;
  });
  if (threadIdx.x < kQueries / 2)
    cp_async(
        &terms[2 * threadIdx.x],
        workspace.terms + (batch * f.q_heads + head) * workspace.padded_queries + first + 2 * threadIdx.x);
  if (threadIdx.x < 32) tile_bounds(spans, first, live, bounds);
  const int row = threadIdx.x / 32 * 16 * kRowTiles;  // the first of this warp
  __syncthreads();
  KeyWalk walk(bounds, spans.bounds_count(), kKeys);
  KeyRange next = walk.next();
  copy_keys(next, 0);

  // ---- main loop over the key ranges that some query sees
  float grad_q[kRowTiles][kDim / 8][4] = {};
  for (int stage = 0; next.begin < next.end; stage ^= 1) {
    const KeyRange range = next;
    cp_async_wait_group<0>();
    __syncthreads();  // these keys are there, those before them were used
    next = walk.next();
    copy_keys(next, stage ^ 1);
    // Rows of other warps may be the only ones that see any of these keys.
    const auto sees_key = [&](int i) { return visible[stage].of_query[row + i] != 0; };
    if (!all_visible(range) && !any_of<16 * kRowTiles>(sees_key)) continue;

    float weights[kRowTiles][kKeys / 8][4] = {}, score_grads[kRowTiles][kKeys / 8][4] = {};
    add_products_transposed<kDim / 16>(weights, queries, row, keys(stage));
    add_products_transposed<kDim / 16>(score_grads, grads, row, values(stage));
    const auto term = [&](int query, int) { return terms[row + query]; };
    if (all_visible(range))
      score_gradients(weights, score_grads, f.scale * 1.44269504f, term, [](int, int) { return true; });
    else
      score_gradients(weights, score_grads, f.scale * 1.44269504f, term, [&](int query, int key) {
        return (visible[stage].of_query[row + query] >> key & 1) != 0;
      });
    add_products(grad_q, score_grads, keys(stage));
  }

  // ---- epilogue
  float factors[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) factors[m][0] = factors[m][1] = f.scale;
  scale_rows(grad_q, factors);
  cp_async_wait_group<0>();
  __syncthreads();  // no copy of queries is under way
  queries.put(grad_q, row);
  __syncwarp();
  T* to = head_pointer<T>(p.grad_q, p.grad_q_layout, batch, head) + first * p.grad_q_layout.position_stride;
  queries.template store_rows<kDim>(row, min(row + 16 * kRowTiles, live), f.head_dim,
                                    [&](int i) { return to + i * p.grad_q_layout.position_stride; });
}

template <class T, int kDim>
cudaError_t launch_backward_dq(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                               cudaStream_t stream) {
  using Tiles = BackwardDqTiles<kDim>;
  const int64_t tiles = (p.forward.q_len + Tiles::kQueries - 1) / Tiles::kQueries;
  return launch_ctas(backward_dq_kernel<T, kDim>, tiles * p.forward.q_heads * p.forward.batch,
                     Tiles::kThreads, Tiles::kSharedBytes, stream, p, workspace);
}

}  // namespace dllm::cuda::sm80
