// Gradients of keys and values for Hopper: a CTA owns 128 keys of one kv head and takes in all queries of the
// group that see some of them, in order. One warp fetches, two warpgroups own 64 keys each. Scores are
// computed transposed, keys by queries, so that P and dS are ready to be multiplied with dO and q from the
// left: dv = P dO, dk = scale dS q.
#pragma once

#include "cuda/block_attention/sm90/accumulator.cuh"
#include "cuda/block_attention/sm90/launch.h"
#include "cuda/block_attention/sm90/operand_tile.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/sm90/tile_ring.cuh"
#include "cuda/tiles/head_pointer.cuh"
#include "cuda/tiles/sequence_spans.cuh"

namespace dllm::cuda::sm90 {

template <class T, int kDim>
struct BackwardDkv {
  using Tiles = BackwardDkvTiles<kDim>;
  static constexpr int kQueries = Tiles::kQueries, kStages = Tiles::kStages;
  using KeyRows = OperandTile<kDim, Tiles::kKeys>;
  using QueryRows = OperandTile<kDim, kQueries>;

  enum class Tile : int { none, partial, full };  // none: there are no more; full: every query sees all keys
  struct Shared {
    Mbarrier keys, landed;  // `landed`: a tile of which some rows have to be cleared
    BufferBarriers queries[kStages];
    Tile tiles[kStages];
    alignas(16) float2 terms[kStages][kQueries];  // see backward_preprocess.cuh
    uint64_t visible[kStages][Tiles::kConsumers]
                    [kQueries];  // of a partial tile: bit i: the query sees key i of 64
  };
  static_assert(sizeof(Shared) <= Tiles::kStaticBytes);
  static_assert(kQueries == 64, "a bit of 64 for each query, two terms for each lane");

  const GradientParams& p;
  Shared& shared;
  unsigned char* panels;  // keys, values, then queries and gradients of their outputs of every stage
  WorkOrder::Item item;   // its head is a kv head

  __device__ KeyRows keys() const { return {panels}; }
  __device__ KeyRows values() const { return {panels + KeyRows::kBytes}; }
  __device__ QueryRows queries(int stage) const {
    return {panels + 2 * KeyRows::kBytes + 2 * stage * QueryRows::kBytes};
  }
  __device__ QueryRows grads(int stage) const { return {queries(stage).data + QueryRows::kBytes}; }
  __device__ int first() const { return item.tile * Tiles::kKeys; }
  __device__ int live() const { return min(p.attention().kv_len - first(), Tiles::kKeys); }

  // ---- the warp that fetches
  // visit(tile, full) for the query tiles that may see some of the keys, in order, by all lanes.
  template <class Visit>
  __device__ void for_query_tiles(const Visit& visit) const {
    const BlockAttentionParams& f = p.attention();
    const int tiles = (f.q_len + kQueries - 1) / kQueries;
    const SpanBounds* bounds =
        f.spans.data ? p.workspace.bounds + (f.spans.batch_stride ? item.batch : 0) * tiles * kMaxSpanBounds
                     : nullptr;
#pragma unroll 1
    for (int base = 0; base < tiles; base += 32) {
      const int mine = base + threadIdx.x % 32;
      Visibility seen = Visibility::none;
      if (mine < tiles)
        seen = bounds ? visibility(bounds + mine * kMaxSpanBounds, min(f.spans.count, kMaxSpanBounds),
                                   first(), first() + live())
                      : Visibility::full;
      const unsigned full = __ballot_sync(~0u, seen == Visibility::full);
      for (unsigned left = __ballot_sync(~0u, seen != Visibility::none); left; left &= left - 1) {
        const int i = __ffs(static_cast<int>(left)) - 1;
        visit(base + i, (full >> i & 1) != 0);
      }
    }
  }

  __device__ void load() const {
    const BlockAttentionParams& f = p.attention();
    const int lane = threadIdx.x % 32, group = f.q_heads / f.kv_heads;
    if (lane == 0) {
      mbarrier_arrive_expect_tx(shared.keys, 2 * KeyRows::kBytes);
      keys().load(p.k, shared.keys, item.batch, item.head, first());
      values().load(p.v, shared.keys, item.batch, item.head, first());
    }
    const SequenceSpans spans(f.spans, item.batch, f.kv_len);
    RingPosition<kStages> ring;
    RingPosition<1> landed;
#pragma unroll 1
    for (int head = item.head * group; head < (item.head + 1) * group; head++) {
      const float2* terms = p.workspace.terms + (static_cast<int64_t>(item.batch) * f.q_heads + head) *
                                                    p.workspace.padded_queries;
      for_query_tiles([&](int tile, bool full) {
        const int query = tile * kQueries;
        const float4 two_terms = reinterpret_cast<const float4*>(terms + query)[lane];
        BufferBarriers& buffer = shared.queries[ring.stage];
        buffer.wait_empty(ring.parity);
        reinterpret_cast<float4*>(shared.terms[ring.stage])[lane] = two_terms;
        if (lane == 0) shared.tiles[ring.stage] = full ? Tile::full : Tile::partial;
        __syncwarp();
        if (lane == 0) {
          Mbarrier& barrier = full ? buffer.full : shared.landed;
          mbarrier_arrive_expect_tx(barrier, 2 * QueryRows::kBytes);
          queries(ring.stage).load(p.q, barrier, item.batch, head, query);
          grads(ring.stage).load(p.grad_out, barrier, item.batch, head, query);
        }
        if (!full) {
          const uint64_t partners = mark_visible(spans, query, ring.stage);
          mbarrier_wait_parity(shared.landed, landed.parity);
          landed.advance();
          queries(ring.stage).clear({partners});
          grads(ring.stage).clear({partners});
          fence_proxy_async();
          __syncwarp();
          if (lane == 0) mbarrier_arrive(buffer.full);
        }
        ring.advance();
      });
    }
    BufferBarriers& buffer = shared.queries[ring.stage];
    buffer.wait_empty(ring.parity);
    if (lane == 0) {
      shared.tiles[ring.stage] = Tile::none;
      mbarrier_arrive(buffer.full);
    }
  }

  // Writes which keys every query of the tile sees; returns which queries see any.
  __device__ uint64_t mark_visible(const SequenceSpans& spans, int query, int stage) const {
    uint64_t partners = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < kQueries; i += 32) {
      uint64_t any = 0;
#pragma unroll 1
      for (int word = 0; word < Tiles::kConsumers; word++) {
        uint64_t keys = 0;
        if (query + i < p.attention().q_len)
          keys = spans.visible_keys(query + i, {first() + 64 * word, first() + live(), false});
        shared.visible[stage][word][i] = keys;
        any |= keys;
      }
      if (any) partners |= uint64_t{1} << i;
    }
    return warp_or(partners);
  }

  // ---- the warpgroups that multiply
  __device__ static void start_transposed(float (&scores)[kQueries / 8][4], const KeyRows& rows, int group,
                                          const QueryRows& columns) {
#pragma unroll
    for (int step = 0; step < kDim / kWgmmaDepth; step++)
      wgmma_mma_async<T, Major::k, Major::k>(scores, rows.k_major(64 * group, step), columns.k_major(0, step),
                                             step > 0);
    wgmma_commit_group();
  }
  __device__ static void start_sums(float (&sums)[kDim / 8][4], const uint32_t (&left)[kQueries / 16][4],
                                    const QueryRows& right) {
#pragma unroll
    for (int step = 0; step < kQueries / kWgmmaDepth; step++)
      wgmma_mma_async<T, Major::mn>(sums, left[step], right.mn_major(step), true);
    wgmma_commit_group();
  }

  // Zeros where a query does not see a key, of what a thread holds.
  __device__ void hide(float (&scores)[kQueries / 8][4], float (&score_grads)[kQueries / 8][4], int group,
                       int stage) const {
    const int pair = threadIdx.x % 4, row = accumulator_row();
#pragma unroll
    for (int n = 0; n < kQueries / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint64_t keys = shared.visible[stage][group][8 * n + 2 * pair + i % 2];
        if (!(keys >> (row + i / 2 * 8) & 1)) scores[n][i] = score_grads[n][i] = 0.0f;
      }
    }
  }

  __device__ void take_in(int group) const {
    const int pair = threadIdx.x % 4;
    const float factor = p.attention().scale * 1.44269504f;
    float grad_k[kDim / 8][4] = {}, grad_v[kDim / 8][4] = {};
    float scores[kQueries / 8][4], score_grads[kQueries / 8][4];
    uint32_t weights[kQueries / 16][4], packed_grads[kQueries / 16][4];

    mbarrier_wait_parity(shared.keys, 0);
    RingPosition<kStages> ring;
    for (;; ring.advance()) {
      const int stage = ring.stage;
      shared.queries[stage].wait_full(ring.parity);
      const Tile tile = shared.tiles[stage];
      if (tile == Tile::none) break;
      wgmma_fence(scores, score_grads);
      start_transposed(scores, keys(), group, queries(stage));
      start_transposed(score_grads, values(), group, grads(stage));
      wgmma_wait_group<0>(scores, score_grads);
#pragma unroll
      for (int n = 0; n < kQueries / 8; n++) {
        const float4 terms = *reinterpret_cast<const float4*>(&shared.terms[stage][8 * n + 2 * pair]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          scores[n][i] = fast_exp2(fmaf(scores[n][i], factor, i % 2 ? -terms.z : -terms.x));
          score_grads[n][i] = scores[n][i] * (score_grads[n][i] - (i % 2 ? terms.w : terms.y));
        }
      }
      if (tile == Tile::partial) hide(scores, score_grads, group, stage);
      pack_columns<T>(weights, scores);
      pack_columns<T>(packed_grads, score_grads);
      wgmma_fence(grad_v, grad_k, weights, packed_grads);
      start_sums(grad_v, weights, grads(stage));
      start_sums(grad_k, packed_grads, queries(stage));
      wgmma_wait_group<0>(grad_v, grad_k);
      shared.queries[stage].release();
    }

    const int row = accumulator_row(group);
    const HeadsLayout& layout = p.backward.grad_kv_layout;
    T* to_k =
        head_pointer<T>(p.backward.grad_k, layout, item.batch, item.head) + first() * layout.position_stride;
    T* to_v =
        head_pointer<T>(p.backward.grad_v, layout, item.batch, item.head) + first() * layout.position_stride;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = row + 8 * half;
      store_accumulator_row(to_k + i * layout.position_stride, grad_k, half, p.attention().scale, i < live());
      store_accumulator_row(to_v + i * layout.position_stride, grad_v, half, 1.0f, i < live());
    }
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(BackwardDkvTiles<kDim>::kThreads, 1)
    backward_dkv_kernel(const __grid_constant__ GradientParams p) {
  using Tiles = BackwardDkvTiles<kDim>;
  using Role = BackwardDkv<T, kDim>;
  __shared__ typename Role::Shared shared;
  const Role role{p, shared, panel_shared(), p.order.item(blockIdx.x)};

  if (threadIdx.x == 0) {
    mbarrier_init(shared.keys, 1);
    mbarrier_init(shared.landed, 1);
    for (int stage = 0; stage < Tiles::kStages; stage++)
      shared.queries[stage].init(Tiles::kConsumers * kWarpgroup / 32);
    fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x < kWarpgroup) {
    setmaxnreg_dec<Tiles::kProducerRegisters>();
    if (threadIdx.x < 32) role.load();
  } else {
    setmaxnreg_inc<Tiles::kConsumerRegisters>();
    role.take_in(threadIdx.x / kWarpgroup - 1);
  }
}

template <class T, int kDim>
cudaError_t launch_backward_dkv_kernel(const GradientParams& p, cudaStream_t stream) {
  using Tiles = BackwardDkvTiles<kDim>;
  return launch_ctas(backward_dkv_kernel<T, kDim>, p.order.items(), Tiles::kThreads, Tiles::kSharedBytes,
                     stream, p);
}

}  // namespace dllm::cuda::sm90
