// block_attention forward on tensor cores (mma.sync): a CTA takes a tile of queries of one head past the keys
// they see, 64 at a time, with an online softmax in base 2. Scores and output stay in registers.
#pragma once

#include "core/params.h"
#include "cuda/block_attention/sm80/config.h"
#include "cuda/block_attention/sm80/launch.h"
#include "cuda/launch_kernel.h"
#include "cuda/tiles/head_pointer.cuh"
#include "cuda/tiles/online_softmax.cuh"
#include "cuda/tiles/sequence_spans.cuh"
#include "cuda/tiles/shared_tile.cuh"

namespace dllm::cuda::sm80 {

template <class T, int kDim>
__global__ void __launch_bounds__(ForwardTiles<kDim>::kThreads, 2)
    forward_kernel(const BlockAttentionParams p) {
  using Tiles = ForwardTiles<kDim>;
  constexpr int kThreads = Tiles::kThreads, kRowTiles = Tiles::kRowTiles, kKeys = Tiles::kKeys;

  // ---- shared memory plan
  const SharedTile<T, kDim> queries{dynamic_shared<T>()};  // then the output
  const SharedTile<T, kDim> keys{queries.data + Tiles::kQueries * kDim};
  const SharedTile<T, kDim> values{keys.data + kKeys * kDim};
  __shared__ SpanBounds bounds[kMaxSpanBounds];
  __shared__ VisibleKeys<Tiles::kQueries, kThreads> visible;
  static_assert(sizeof(bounds) + sizeof(visible) <= kSmallStatics);

  // ---- which queries
  const int tiles = (p.q_len + Tiles::kQueries - 1) / Tiles::kQueries;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * Tiles::kQueries;  // longest first
  const int head = blockIdx.x / tiles % p.q_heads;
  const int64_t batch = blockIdx.x / tiles / p.q_heads;
  const int kv_head = head / (p.q_heads / p.kv_heads);
  const int live = min(p.q_len - first, Tiles::kQueries);
  const T* q = head_pointer<T>(p.q, p.q_layout, batch, head) + first * p.q_layout.position_stride;
  const T* k = head_pointer<T>(p.k, p.k_layout, batch, kv_head);
  const T* v = head_pointer<T>(p.v, p.v_layout, batch, kv_head);
  const SequenceSpans spans(p.spans, batch, p.kv_len);

  const auto copy_keys = [&](KeyRange range) {
    keys.template copy_rows<kThreads, kKeys>(p.head_dim, [&](int i) {
      return i < range.end - range.begin ? k + (range.begin + i) * p.k_layout.position_stride : nullptr;
    });
    cp_async_commit_group();
  };
  queries.template copy_rows<kThreads, Tiles::kQueries>(
      p.head_dim, [&](int i) { return i < live ? q + i * p.q_layout.position_stride : nullptr; });
  if (threadIdx.x < 32) tile_bounds(spans, first, live, bounds);
  __syncthreads();
  KeyWalk walk(bounds, spans.bounds_count(), kKeys);
  KeyRange range = walk.next();
  copy_keys(range);

  // ---- main loop over the key ranges that some query sees
  const int row = threadIdx.x / 32 * 16 * kRowTiles;  // the first of this warp
  OnlineSoftmax<kRowTiles> softmax(p.scale);
  float out[kRowTiles][kDim / 8][4] = {};
  while (range.begin < range.end) {
    const bool all_visible = range.full && range.end - range.begin == kKeys;
    cp_async_wait_group<0>();
    __syncthreads();  // the keys are there, the values before them were used
    uint64_t seen = ~uint64_t{0};
    if (!all_visible)
      seen = visible.mark([&](int i) { return i < live ? spans.visible_keys(first + i, range) : 0; });
    values.template copy_rows<kThreads, kKeys>(p.head_dim, [&](int i) {
      return seen >> i & 1 ? v + (range.begin + i) * p.v_layout.position_stride : nullptr;
    });
    cp_async_commit_group();

    float scores[kRowTiles][kKeys / 8][4] = {};
    add_products_transposed(scores, queries, row, keys);

    range = walk.next();
    cp_async_wait_group<0>();
    __syncthreads();  // the values are there, the keys were used
    copy_keys(range);

    if (p.scale < 0.0f) negate(scores);
    if (!all_visible) {
      // Rows of other warps may be the only ones that see any of these keys.
      if (!any_of<16 * kRowTiles>([&](int i) { return visible.of_query[row + i] != 0; })) continue;
      hide_invisible(scores, visible.of_query + row);
    }
    float decay[kRowTiles][2];
    if (softmax.update(scores, decay)) scale_rows(out, decay);
    add_products(out, scores, values);
  }

  // ---- epilogue
  softmax.finish();
  float inverse[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const SoftmaxState& state = softmax.state(m, half);
      inverse[m][half] = state.inverse_sum();
      const int i = row + 16 * m + threadIdx.x % 32 / 4 + 8 * half;
      if (threadIdx.x % 4 == 0 && i < live)
        p.lse[(batch * p.q_heads + head) * p.q_len + first + i] = state.log_sum_exp();
    }
  }
  scale_rows(out, inverse);
  cp_async_wait_group<0>();
  __syncthreads();  // no copy of queries is under way
  queries.put(out, row);
  __syncwarp();
  T* to = head_pointer<T>(p.out, p.out_layout, batch, head) + first * p.out_layout.position_stride;
  queries.template store_rows<kDim>(row, min(row + 16 * kRowTiles, live), p.head_dim,
                                    [&](int i) { return to + i * p.out_layout.position_stride; });
}

template <class T, int kDim>
cudaError_t launch_forward(const BlockAttentionParams& p, cudaStream_t stream) {
  using Tiles = ForwardTiles<kDim>;
  const int64_t tiles = (p.q_len + Tiles::kQueries - 1) / Tiles::kQueries;
  return launch_ctas(forward_kernel<T, kDim>, tiles * p.q_heads * p.batch, Tiles::kThreads,
                     Tiles::kSharedBytes, stream, p);
}

}  // namespace dllm::cuda::sm80
