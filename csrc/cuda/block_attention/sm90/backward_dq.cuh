// Gradients of queries for Hopper: a CTA owns 128 queries of one head and takes in the keys they see, 64 at a
// time: dq = scale dS k. One warp fetches, two warpgroups own 64 queries each. The products of the next
// scores are under way while dS and keys are multiplied.
#pragma once

#include "cuda/block_attention/sm90/accumulator.cuh"
#include "cuda/block_attention/sm90/key_tiles.cuh"
#include "cuda/block_attention/sm90/launch.h"
#include "cuda/block_attention/sm90/operand_tile.cuh"
#include "cuda/block_attention/sm90/visible_bits.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/sm90/tile_ring.cuh"
#include "cuda/tiles/head_pointer.cuh"
#include "cuda/tiles/sequence_spans.cuh"

namespace dllm::cuda::sm90 {

template <class T, int kDim>
struct BackwardDq {
  using Tiles = BackwardDqTiles<kDim>;
  static constexpr int kKeys = Tiles::kKeys, kStages = Tiles::kStages;
  using QueryRows = OperandTile<kDim, Tiles::kQueries>;
  using KeyRows = OperandTile<kDim, kKeys>;

  struct Shared {
    Mbarrier queries, landed;  // `landed`: a tile of which some rows have to be cleared
    BufferBarriers keys[kStages];
    KeyTile tiles[kStages];
    SpanBounds bounds[kMaxSpanBounds];
  };
  static_assert(sizeof(Shared) <= kSmallStatics);

  const GradientParams& p;
  Shared& shared;
  unsigned char* panels;  // queries, gradients of their outputs, then keys and values of every stage
  WorkOrder::Item item;

  __device__ QueryRows queries() const { return {panels}; }
  __device__ QueryRows grads() const { return {panels + QueryRows::kBytes}; }
  __device__ KeyRows keys(int stage) const {
    return {panels + 2 * QueryRows::kBytes + 2 * stage * KeyRows::kBytes};
  }
  __device__ KeyRows values(int stage) const { return {keys(stage).data + KeyRows::kBytes}; }

  __device__ int first() const { return item.tile * Tiles::kQueries; }
  __device__ int live() const { return min(p.attention().q_len - first(), Tiles::kQueries); }
  __device__ SequenceSpans spans() const {
    return SequenceSpans(p.attention().spans, item.batch, p.attention().kv_len);
  }

  // ---- the warp that fetches. Keys that no query sees are cleared: their dS is 0, but 0 times infinity is
  // not.
  __device__ void load() const {
    const bool leads = threadIdx.x % 32 == 0;
    if (leads) {
      mbarrier_arrive_expect_tx(shared.queries, 2 * QueryRows::kBytes);
      queries().load(p.q, shared.queries, item.batch, item.head, first());
      grads().load(p.grad_out, shared.queries, item.batch, item.head, first());
    }
    const int kv_head = item.head / (p.attention().q_heads / p.attention().kv_heads);
    const SequenceSpans seen_by = spans();
    RingPosition<kStages> ring;
    RingPosition<1> landed;
    for_key_tiles<kKeys>(seen_by, first(), live(), shared.bounds, [&](const KeyTile& tile) {
      BufferBarriers& buffer = shared.keys[ring.stage];
      const bool clear = !tile.all_visible;
      buffer.wait_empty(ring.parity);
      if (leads) {
        Mbarrier& barrier = clear ? shared.landed : buffer.full;
        shared.tiles[ring.stage] = tile;
        mbarrier_arrive_expect_tx(barrier, 2 * KeyRows::kBytes);
        keys(ring.stage).load(p.k, barrier, item.batch, kv_head, tile.begin);
        values(ring.stage).load(p.v, barrier, item.batch, kv_head, tile.begin);
      }
      if (clear) {
        const uint64_t seen[1] = {seen_keys(seen_by, first(), live(), tile.begin, tile.end)};
        mbarrier_wait_parity(shared.landed, landed.parity);
        landed.advance();
        keys(ring.stage).clear(seen);
        fence_proxy_async();
        __syncwarp();
        if (leads) mbarrier_arrive(buffer.full);
      }
      ring.advance();
    });
  }

  // ---- the warpgroups that multiply
  __device__ void start_scores(float (&scores)[kKeys / 8][4], float (&score_grads)[kKeys / 8][4], int group,
                               int stage) const {
#pragma unroll
    for (int step = 0; step < kDim / kWgmmaDepth; step++)
      wgmma_mma_async<T, Major::k, Major::k>(scores, queries().k_major(64 * group, step),
                                             keys(stage).k_major(0, step), step > 0);
#pragma unroll
    for (int step = 0; step < kDim / kWgmmaDepth; step++)
      wgmma_mma_async<T, Major::k, Major::k>(score_grads, grads().k_major(64 * group, step),
                                             values(stage).k_major(0, step), step > 0);
    wgmma_commit_group();
  }

  __device__ void take_in(int group) const {
    const BlockAttentionParams& f = p.attention();
    const int pair = threadIdx.x % 4;
    const int row = accumulator_row(group);  // and row + 8
    const float factor = f.scale * 1.44269504f;
    const SequenceSpans seen_by = spans();
    const QuerySpans query_spans[2] = {QuerySpans(seen_by, first() + row, row < live()),
                                       QuerySpans(seen_by, first() + row + 8, row + 8 < live())};
    const float2* of_queries =
        p.workspace.terms +
        (static_cast<int64_t>(item.batch) * f.q_heads + item.head) * p.workspace.padded_queries + first() +
        row;
    const float2 terms[2] = {of_queries[0], of_queries[8]};

    float grad_q[kDim / 8][4] = {};
    float scores[kKeys / 8][4], score_grads[kKeys / 8][4];
    uint32_t packed[kKeys / 16][4];
    RingPosition<kStages> ring;
    const auto await_keys = [&] {
      shared.keys[ring.stage].wait_full(ring.parity);
      return shared.tiles[ring.stage];
    };
    // dS from scores and dO·v; then wait().
    const auto differentiate = [&](const KeyTile& tile, const auto& wait) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float weight = fast_exp2(fmaf(scores[n][i], factor, -terms[i / 2].x));
          score_grads[n][i] = weight * (score_grads[n][i] - terms[i / 2].y);
        }
      }
      if (!tile.all_visible) {
        keep_visible(score_grads,
                     {query_spans[0].visible(seen_by, tile.begin, tile.end, pair),
                      query_spans[1].visible(seen_by, tile.begin, tile.end, pair)},
                     0.0f);
        wait();
      } else {  // a wait in each branch: ptxas would move a common one to before all this
        wait();
      }
    };
    const auto start_sums = [&](int stage) {
#pragma unroll
      for (int step = 0; step < kKeys / kWgmmaDepth; step++)
        wgmma_mma_async<T, Major::mn>(grad_q, packed[step], keys(stage).mn_major(step), true);
      wgmma_commit_group();
    };

    mbarrier_wait_parity(shared.queries, 0);
    KeyTile tile = await_keys();
    wgmma_fence(scores, score_grads);
    start_scores(scores, score_grads, group, ring.stage);
    wgmma_wait_group<0>(scores, score_grads);
    differentiate(tile, [] {});
    pack_columns<T>(packed, score_grads);
    while (!tile.last) {
      const int stage = ring.stage;
      ring.advance();
      tile = await_keys();
      wgmma_fence(scores, score_grads, grad_q, packed);
      start_scores(scores, score_grads, group, ring.stage);
      start_sums(stage);
      wgmma_wait_group<1>(scores, score_grads);
      differentiate(tile, [&] { wgmma_wait_group<0>(grad_q); });
      shared.keys[stage].release();
      pack_columns<T>(packed, score_grads);
    }
    wgmma_fence(grad_q, packed);
    start_sums(ring.stage);
    wgmma_wait_group<0>(grad_q);

    T* to = head_pointer<T>(p.backward.grad_q, p.backward.grad_q_layout, item.batch, item.head) +
            first() * p.backward.grad_q_layout.position_stride;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = row + 8 * half;
      store_accumulator_row(to + i * p.backward.grad_q_layout.position_stride, grad_q, half, f.scale,
                            i < live());
    }
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(BackwardDqTiles<kDim>::kThreads, 1)
    backward_dq_kernel(const __grid_constant__ GradientParams p) {
  using Tiles = BackwardDqTiles<kDim>;
  using Role = BackwardDq<T, kDim>;
  __shared__ typename Role::Shared shared;
  const Role role{p, shared, panel_shared(), p.order.item(blockIdx.x)};

  if (threadIdx.x == 0) {
    mbarrier_init(shared.queries, 1);
    mbarrier_init(shared.landed, 1);
    for (int stage = 0; stage < Tiles::kStages; stage++)
      shared.keys[stage].init(Tiles::kConsumers * kWarpgroup / 32);
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
cudaError_t launch_backward_dq_kernel(const GradientParams& p, cudaStream_t stream) {
  using Tiles = BackwardDqTiles<kDim>;
  return launch_ctas(backward_dq_kernel<T, kDim>, p.order.items(), Tiles::kThreads, Tiles::kSharedBytes,
                     stream, p);
}

}  // namespace dllm::cuda::sm90
