// Gradients of keys and values on tensor cores: a CTA owns a tile of keys of one kv head and takes in all
// queries of the group that see some of it, in order. Scores are computed transposed, keys by queries, so
// that P and dS are ready to be multiplied with dO and q from the left: dv = P dO, dk = scale dS q.
#pragma once

#include "cuda/block_attention/query_walk.cuh"
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
__global__ void __launch_bounds__(BackwardDkvTiles<kDim>::kThreads, 2)
    backward_dkv_kernel(const BlockAttentionBackwardParams p, const BackwardWorkspace workspace) {
  using Tiles = BackwardDkvTiles<kDim>;
  constexpr int kThreads = Tiles::kThreads, kKeys = Tiles::kKeys, kQueries = Tiles::kQueries;
  constexpr int kSliceDim = Tiles::kSliceDim, kSlices = kDim / kSliceDim;
  const BlockAttentionParams& f = p.forward;

  // ---- shared memory plan
  const SharedTile<T, kDim> keys{dynamic_shared<T>()};  // then their gradients
  const SharedTile<T, kDim> values{keys.data + kKeys * kDim};
  T* stages = values.data + kKeys * kDim;  // twice queries and gradients of their outputs
  const auto queries = [&](int stage) { return SharedTile<T, kDim>{stages + 2 * stage * kQueries * kDim}; };
  const auto grads = [&](int stage) { return SharedTile<T, kDim>{queries(stage).data + kQueries * kDim}; };
  alignas(16) __shared__ float2 terms[2][kQueries];
  __shared__ VisibleKeys<kQueries, kThreads> visible[2];  // of the tile's keys
  __shared__ QueryList<kThreads> list;
  static_assert(sizeof(terms) + sizeof(visible) + sizeof(list) <= kSmallStatics);

  // ---- which keys
  const int tiles = (f.kv_len + kKeys - 1) / kKeys;
  const int column = blockIdx.x % kSlices * kSliceDim;
  const int first = static_cast<int>(blockIdx.x / kSlices % tiles) * kKeys;  // causal: longest first
  const int kv_head = blockIdx.x / kSlices / tiles % f.kv_heads;
  const int64_t batch = blockIdx.x / kSlices / tiles / f.kv_heads;
  const int live = min(f.kv_len - first, kKeys), group = f.q_heads / f.kv_heads;
  const T* k = head_pointer<T>(f.k, f.k_layout, batch, kv_head) + first * f.k_layout.position_stride;
  const T* v = head_pointer<T>(f.v, f.v_layout, batch, kv_head) + first * f.v_layout.position_stride;
  const SequenceSpans spans(f.spans, batch, f.kv_len);
  QueryWalk<kQueries, kThreads> walk(list, bounds_of(workspace, f, batch), spans.bounds_count(), f.q_len,
                                     group, first, first + live);

  const auto copy_queries = [&](QueryRange range, int stage) {
    if (range.count > 0) {
      if (!range.full)
        visible[stage].mark([&](int i) {
          return i < range.count ? spans.visible_keys(range.first + i, {first, first + live, false}) : 0;
        });
      const auto takes_part = [&](int i) {
        return range.full ? i < range.count : visible[stage].of_query[i] != 0;
      };
      const int head = kv_head * group + range.head;
      const T* q = head_pointer<T>(f.q, f.q_layout, batch, head) + range.first * f.q_layout.position_stride;
      queries(stage).template copy_rows<kThreads, kQueries>(
          f.head_dim, [&](int i) { return takes_part(i) ? q + i * f.q_layout.position_stride : nullptr; });
      const T* grad = head_pointer<T>(p.grad_out, p.grad_out_layout, batch, head) +
                      range.first * p.grad_out_layout.position_stride;
      grads(stage).template copy_rows<kThreads, kQueries>(f.head_dim, [&](int i) {
        return takes_part(i) ? grad + i * p.grad_out_layout.position_stride : nullptr;
      });
      if (threadIdx.x < kQueries / 2)
        cp_async(&terms[stage][2 * threadIdx.x], workspace.terms +
                                                     (batch * f.q_heads + head) * workspace.padded_queries +
                                                     range.first + 2 * threadIdx.x);
    }
    cp_async_commit_group();
  };
  keys.template copy_rows<kThreads, kKeys>(
      f.head_dim, [&](int i) { return i < live ? k + i * f.k_layout.position_stride : nullptr; });
  values.template copy_rows<kThreads, kKeys>(
      f.head_dim, [&](int i) { return i < live ? v + i * f.v_layout.position_stride : nullptr; });
  cp_async_commit_group();
  cp_async_wait_group<0>();
  __syncthreads();
  const int row = threadIdx.x / 32 * 16;  // the first of this warp
  uint32_t key_rows[kDim / 16][4];        // stay in registers, to spare shared memory the reads
#pragma unroll
  for (int i = 0; i < kDim / 16; i++) keys.load_a(key_rows[i], row, i);
  QueryRange next = walk.next();
  copy_queries(next, 0);

  // ---- main loop over the query tiles that see some of the keys
  float grad_k[1][kSliceDim / 8][4] = {}, grad_v[1][kSliceDim / 8][4] = {};
  for (int stage = 0; next.count > 0; stage ^= 1) {
    const QueryRange range = next;
    cp_async_wait_group<0>();
    __syncthreads();  // these queries are there, those before them were used
    next = walk.next();
    copy_queries(next, stage ^ 1);

    float weights[1][kQueries / 8][4] = {}, score_grads[1][kQueries / 8][4] = {};
    const auto key_row = [&](uint32_t (&left)[1][4], int i) {
#pragma unroll
      for (int j = 0; j < 4; j++) left[0][j] = key_rows[i][j];
    };
    add_products_transposed<kDim / 16>(weights, key_row, queries(stage));
    add_products_transposed<kDim / 16>(score_grads, values, row, grads(stage));
    const auto term = [&](int, int query) { return terms[stage][query]; };
    if (range.full)
      score_gradients(weights, score_grads, f.scale * 1.44269504f, term, [](int, int) { return true; });
    else
      score_gradients(weights, score_grads, f.scale * 1.44269504f, term, [&](int key, int query) {
        return (visible[stage].of_query[query] >> (row + key) & 1) != 0;
      });
    add_products(grad_v, weights, grads(stage), column);
    add_products(grad_k, score_grads, queries(stage), column);
  }

  // ---- epilogue
  const float factors[1][2] = {{f.scale, f.scale}};
  scale_rows(grad_k, factors);
  __syncwarp();  // its lanes have read these rows, which are theirs alone
  keys.put(grad_k, row, column);
  values.put(grad_v, row, column);
  __syncwarp();
  const auto store = [&](const SharedTile<T, kDim>& tile, void* to) {
    T* rows =
        head_pointer<T>(to, p.grad_kv_layout, batch, kv_head) + first * p.grad_kv_layout.position_stride;
    tile.template store_rows<kSliceDim>(
        row, min(row + 16, live), f.head_dim,
        [&](int i) { return rows + i * p.grad_kv_layout.position_stride; }, column);
  };
  store(keys, p.grad_k);
  store(values, p.grad_v);
}

template <class T, int kDim>
cudaError_t launch_backward_dkv(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                                cudaStream_t stream) {
  using Tiles = BackwardDkvTiles<kDim>;
  const int64_t tiles = (p.forward.kv_len + Tiles::kKeys - 1) / Tiles::kKeys * (kDim / Tiles::kSliceDim);
  return launch_ctas(backward_dkv_kernel<T, kDim>, tiles * p.forward.kv_heads * p.forward.batch,
                     Tiles::kThreads, Tiles::kSharedBytes, stream, p, workspace);
}

}  // namespace dllm::cuda::sm80
