// cached_block_attention on tensor cores (mma.sync): a CTA takes a tile of the rows that share a kv head
// (queries times the heads of a group) past the key tiles of one split, with an online softmax in base 2.
// Copies of a few key tiles are under way at any time.
#pragma once

#include "cuda/cached_attention/fresh_tokens.cuh"
#include "cuda/cached_attention/merge.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/tiles/online_softmax.cuh"
#include "cuda/tiles/shared_tile.cuh"

namespace dllm::cuda {

// Rows [row, end) of this warp, of which the CTA's first has its place at `partial`.
template <int kRowTiles, int kTiles>
__device__ void store_partial(const SplitParams& p, int64_t partial, int row, int end,
                              const OnlineSoftmax<kRowTiles>& softmax,
                              const float (&out)[kRowTiles][kTiles][4]) {
  const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = row + 16 * m + group + 8 * half;
      if (i >= end) continue;
      const SoftmaxState& state = softmax.state(m, half);
      if (pair == 0) p.states[partial + i] = {state.max, state.sum};
      float* sums = p.sums + (partial + i) * p.attention.head_dim + 2 * pair;
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        if (n * 8 < p.attention.head_dim)
          *reinterpret_cast<float2*>(sums + n * 8) = {out[m][n][2 * half], out[m][n][2 * half + 1]};
      }
    }
  }
}

template <class T, int kDim, bool kManyRows>
__global__ void __launch_bounds__(CachedTiles<kDim, kManyRows>::kThreads, CachedTiles<kDim, kManyRows>::kCtas)
    cached_tiles_kernel(const __grid_constant__ SplitParams split_params) {
  using Tiles = CachedTiles<kDim, kManyRows>;
  constexpr int kThreads = Tiles::kThreads, kRowTiles = Tiles::kRowTiles, kRows = Tiles::kRows;
  constexpr int kStages = Tiles::kStages;
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const CachedAttentionParams& p = split_params.attention;

  // ---- shared memory plan: [kStages][keys, values][kCachedKeys][kDim], and the queries, where they are held
  // in registers in the place of the last stage
  T* const stages = dynamic_shared<T>();
  const SharedTile<T, kDim> queries{stages + (kStages - Tiles::kHoldsQueries) * 2 * kCachedKeys * kDim};
  __shared__ SpanBounds bounds[2][kMaxSpanBounds];  // of cached and fresh keys
  __shared__ uint64_t visible[kRows];               // a bit per key of a tile
  // What is needed at the end, as registers are dearer.
  __shared__ SequenceKeys keys;
  __shared__ unsigned* finished;  // counts the CTAs of these rows
  __shared__ int kept_split, kept_present;

  // ---- which rows and keys
  const int group = p.q_heads / p.kv_heads, row_tiles = (p.q_len * group + kRows - 1) / kRows;
  const int first = static_cast<int>(blockIdx.x % row_tiles) * kRows;
  const int kv_head = blockIdx.x / row_tiles % p.kv_heads;
  const int split = blockIdx.x / row_tiles / p.kv_heads % split_params.max_splits;
  const int64_t batch = blockIdx.x / row_tiles / p.kv_heads / split_params.max_splits;
  const GroupRows rows(p, batch, kv_head);
  const int present = min(p.q_len * group - first, kRows);
  if (threadIdx.x == 0) {
    keys = planned_keys(split_params, batch);
    kept_split = split, kept_present = present;
    finished = split_params.plan.counters + (batch * p.kv_heads + kv_head) * row_tiles + first / kRows;
  }
  queries.template copy_rows<kThreads, kRows>(p.head_dim, [&](int i) {
    return i < present ? rows.template at<T>(p.q, p.q_layout, first + i) : nullptr;
  });
  __syncthreads();
  const int live = max(min(keys.live * group - first, kRows), 0);
  if (split >= keys.splits || live == 0) {
    cp_async_commit_group();
    cp_async_wait_group<0>();  // none lands in the shared memory of a CTA that comes after
    if (split > 0) return;
  }
  const auto spans = [&](KeyTile tile) { return spans_of(p, batch, keys.live, tile); };
  const int first_query = rows.position(first);
  const int live_queries = live > 0 ? rows.position(first + live - 1) - first_query + 1 : 0;
  KeyRows<T> key_rows(p, batch, kv_head);
  const int begin = live > 0 ? keys.split_begin(split) : 0, end = live > 0 ? keys.split_begin(split + 1) : 0;
  if (begin < end) key_rows.look_up(keys.tile(begin));  // on its way beside the spans
  if (threadIdx.x < 32) {
    if (p.cache_spans.row_stride) tile_bounds(spans({0, true}), first_query, live_queries, bounds[0]);
    else tile_bounds(spans({0, true}), 0, 1, bounds[0]);
    tile_bounds(spans({0, false}), first_query, live_queries, bounds[1]);
  }
  __syncthreads();

  // ---- copies: lane i finds where key i of a tile lies; what no query of this CTA sees is not read
  const auto stage_of = [&](int t) { return stages + (t - begin) % kStages * 2 * kCachedKeys * kDim; };
  const auto copy_tile = [&](int t) {
    Visibility seen_by_rows = Visibility::none;
    if (t < end) {
      const KeyTile tile = keys.tile(t);
      seen_by_rows = visibility(bounds[!tile.cached], spans(tile).bounds_count(), tile.begin, tile.end());
      unsigned seen = ~0u;
      if (seen_by_rows == Visibility::partial) {
        const SequenceSpans here = spans(tile);
        seen = 0;
        for (int i = threadIdx.x % 32; i < (here.row_stride ? live_queries : 1); i += 32)
          seen |= static_cast<unsigned>(here.visible_keys(first_query + i, tile.range()));
        seen = __reduce_or_sync(~0u, seen);
      }
      if (seen_by_rows != Visibility::none) {
        auto [key, value] = key_rows.rows(tile);
        if (!(seen >> threadIdx.x % 32 & 1)) key = value = nullptr;
        const SharedTile<T, kDim> k{stage_of(t)}, v{stage_of(t) + kCachedKeys * kDim};
        k.template copy_rows<kThreads, kCachedKeys, 8>(p.head_dim, [&](int i) { return shuffled(key, i); });
        v.template copy_rows<kThreads, kCachedKeys, 8>(p.head_dim, [&](int i) { return shuffled(value, i); });
      }
      if (t + 1 < end) key_rows.look_up(keys.tile(t + 1));
    }
    cp_async_commit_group();
    return static_cast<unsigned>(seen_by_rows);
  };
  unsigned ahead = 0;  // visibility of the tiles under way, two bits for each
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; stage++) ahead |= copy_tile(begin + stage) << 2 * stage;

  // ---- fresh tokens: all of them are written, each by one of the CTAs that are here for its queries
  const Rotation& rotation = split_params.rotation;
  if (split_params.writes.positions) {
    const int token = (first + group - 1) / group, tokens = (first + present + group - 1) / group - token;
    const int writers = live > 0 ? keys.splits : 1;
    write_tokens<T>(split_params, batch, kv_head, token + static_cast<int>(int64_t{tokens} * split / writers),
                    token + static_cast<int>(int64_t{tokens} * (split + 1) / writers));
  }
  if (rotation.cos && begin < end) {
    cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the queries are there
    rotate_rows<kThreads, kRows>(queries, rotation, p.head_dim, batch,
                                 [&](int i) { return i < live ? rows.position(first + i) : -1; });
    __syncthreads();
  }

  // ---- main loop over the key tiles of this split
  const int row = threadIdx.x / 32 * Tiles::kWarpRows;  // the first of this warp
  uint32_t held[Tiles::kHoldsQueries ? kDim / 16 : 1][4];
  if constexpr (Tiles::kHoldsQueries) {
    cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the queries are there
#pragma unroll
    for (int k = 0; k < kDim / 16; k++) queries.load_a(held[k], row, k);
  }
  OnlineSoftmax<kRowTiles> softmax(p.scale);
  float out[kRowTiles][kDim / 8][4] = {};
  for (int t = begin; t < end; t++) {
    cp_async_wait_group<kStages - 2>();
    __syncthreads();  // tile t is there, tile t - 1 was used
    const auto seen_by_rows = static_cast<Visibility>(ahead & 3);
    ahead = ahead >> 2 | copy_tile(t + kStages - 1) << 2 * (kStages - 2);
    if (rotation.cos && seen_by_rows != Visibility::none && t >= keys.cached_tiles) {
      const int position = keys.tile(t).begin;
      rotate_rows<kThreads, kCachedKeys>(SharedTile<T, kDim>{stage_of(t)}, rotation, p.head_dim, batch,
                                         [&](int i) { return position + i < keys.live ? position + i : -1; });
      __syncthreads();
    }
    if (seen_by_rows == Visibility::none || row >= live) continue;
    if (seen_by_rows == Visibility::partial) {
      const KeyTile tile = keys.tile(t);
      const int i = row + threadIdx.x % Tiles::kWarpRows;
      const uint64_t mine = i < live ? spans(tile).visible_keys(rows.position(first + i), tile.range()) : 0;
      if (threadIdx.x % 32 < Tiles::kWarpRows) visible[i] = mine;
      __syncwarp();
      if (!__any_sync(~0u, mine != 0)) continue;
    }
    const SharedTile<T, kDim> k{stage_of(t)}, v{stage_of(t) + kCachedKeys * kDim};
    float scores[kRowTiles][kCachedKeys / 8][4] = {};
    if constexpr (Tiles::kHoldsQueries) {
      const auto load_a = [&](uint32_t (&a)[1][4], int step) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[0][i] = held[step][i];
      };
      add_products_transposed<kDim / 16>(scores, load_a, k);
    } else {
      add_products_transposed(scores, queries, row, k);
    }
    if (p.scale < 0.0f) negate(scores);
    if (seen_by_rows == Visibility::partial) hide_invisible(scores, visible + row);
    float decay[kRowTiles][2];
    if (softmax.update(scores, decay)) scale_rows(out, decay);
    add_products(out, scores, v);
  }

  // ---- epilogue: this split's part of the result, or all of it
  softmax.finish();
  const int live_end = min(row + Tiles::kWarpRows, live);
  const auto result = [&](int i) { return rows.template at<T>(p.out, p.out_layout, first + i); };
  if (keys.splits > 1) {
    const int64_t partial =
        partial_index(split_params, batch, kept_split, kv_head, keys.live * group) + first;
    store_partial(split_params, partial, row, live_end, softmax, out);
    if (live > 0 && is_last_cta(finished, keys.splits)) {
      constexpr int kGroups = (kDim + 127) / 128;
      merge_rows<(kManyRows ? 4 : 8) / kGroups, kGroups, T>(split_params, rows, keys, first, first + live);
    }
  } else {
    float inverse[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        inverse[m][half] = softmax.state(m, half).inverse_sum();
        const int i = row + 16 * m + threadIdx.x % 32 / 4 + 8 * half;
        if (threadIdx.x % 4 == 0 && i < live_end)
          p.lse[rows.lse_index(p, first + i)] = softmax.state(m, half).log_sum_exp();
      }
    }
    scale_rows(out, inverse);
    cp_async_wait_group<0>();
    __syncthreads();  // no copy is under way, and no tile is used
    queries.put(out, row);
    __syncwarp();
    queries.template store_rows<kDim>(row, live_end, p.head_dim, result);
  }
  if (kept_split > 0) return;
  for (int i = live + static_cast<int>(threadIdx.x); i < kept_present; i += kThreads) {
    p.lse[rows.lse_index(p, first + i)] = -INFINITY;
    for (int d = 0; d < p.head_dim; d += 8) *reinterpret_cast<uint4*>(result(i) + d) = {0, 0, 0, 0};
  }
}

template <class T, int kDim, bool kManyRows>
cudaError_t launch_cached_tiles(const SplitParams& p, cudaStream_t stream) {
  using Tiles = CachedTiles<kDim, kManyRows>;
  const CachedAttentionParams& a = p.attention;
  const int64_t rows = static_cast<int64_t>(a.q_len) * (a.q_heads / a.kv_heads);
  const int64_t row_tiles = (rows + Tiles::kRows - 1) / Tiles::kRows;
  return launch_overlapping_ctas(cached_tiles_kernel<T, kDim, kManyRows>,
                                 row_tiles * a.kv_heads * p.max_splits * a.batch, Tiles::kThreads,
                                 Tiles::kSharedBytes, stream, p);
}

}  // namespace dllm::cuda
