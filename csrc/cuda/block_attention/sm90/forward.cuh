// block_attention forward for Hopper: persistent CTAs take 128 queries of one head past the keys they see,
// 128 at a time. Of the first warpgroup one warp fetches queries and keys and one fetches values; the other
// two own 64 queries each and take turns: one multiplies while the other does its softmax. The product of the
// next scores is under way while weights and values are multiplied.
#pragma once

#include "cuda/block_attention/sm90/accumulator.cuh"
#include "cuda/block_attention/sm90/key_tiles.cuh"
#include "cuda/block_attention/sm90/launch.h"
#include "cuda/block_attention/sm90/operand_tile.cuh"
#include "cuda/block_attention/sm90/visible_bits.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/tile_ring.cuh"
#include "cuda/tiles/head_pointer.cuh"
#include "cuda/tiles/online_softmax.cuh"
#include "cuda/tiles/sequence_spans.cuh"

namespace dllm::cuda::sm90 {

template <class T, int kDim>
struct Forward {
  using Tiles = ForwardTiles<kDim>;
  static constexpr int kKeys = Tiles::kKeys, kStages = Tiles::kStages;
  using QueryRows = OperandTile<kDim, Tiles::kQueries>;
  using KeyRows = OperandTile<kDim, kKeys>;

  struct Shared {
    BufferBarriers queries, keys[kStages], values[kStages];
    Mbarrier values_landed;  // of a tile of which some rows have to be cleared
    KeyTile tiles[kStages];  // what is in keys[stage]
    SpanBounds bounds[2][kMaxSpanBounds];
  };
  static_assert(sizeof(Shared) <= kSmallStatics);

  const ForwardParams& p;
  Shared& shared;
  QueryRows queries;
  unsigned char* buffers;  // keys, then values

  __device__ KeyRows keys(int stage) const { return {buffers + stage * KeyRows::kBytes}; }
  __device__ KeyRows values(int stage) const { return keys(kStages + stage); }

  // ---- what all roles walk through
  struct Queries {
    int batch, head, kv_head, first, live;
  };
  __device__ Queries queries_of(int index) const {
    const WorkOrder::Item item = p.order.item(index);
    const int first = item.tile * Tiles::kQueries;
    return {item.batch, item.head, item.head / (p.attention.q_heads / p.attention.kv_heads), first,
            min(p.attention.q_len - first, Tiles::kQueries)};
  }
  template <class Visit>
  __device__ void for_queries(const Visit& visit) const {
    for (int round = 0;; round++) {
      const int index = WorkOrder::index(round, blockIdx.x, gridDim.x);
      if (index >= p.order.items()) return;
      visit(queries_of(index));
    }
  }
  __device__ SequenceSpans spans_of(const Queries& q) const {
    return SequenceSpans(p.attention.spans, q.batch, p.attention.kv_len);
  }

  // ---- the warp that fetches queries and keys
  __device__ void load_queries_and_keys() const {
    const bool leads = threadIdx.x % 32 == 0;
    RingPosition<kStages> ring;
    RingPosition<1> query_ring;
    for_queries([&](const Queries& q) {
      shared.queries.wait_empty(query_ring.parity);
      if (leads) {
        mbarrier_arrive_expect_tx(shared.queries.full, QueryRows::kBytes);
        queries.load(p.q, shared.queries.full, q.batch, q.head, q.first);
      }
      query_ring.advance();
      for_key_tiles<kKeys>(spans_of(q), q.first, q.live, shared.bounds[0], [&](const KeyTile& tile) {
        BufferBarriers& buffer = shared.keys[ring.stage];
        buffer.wait_empty(ring.parity);
        if (leads) {
          shared.tiles[ring.stage] = tile;
          mbarrier_arrive_expect_tx(buffer.full, KeyRows::kBytes);
          keys(ring.stage).load(p.k, buffer.full, q.batch, q.kv_head, tile.begin);
        }
        ring.advance();
      });
    });
  }

  // ---- the warp that fetches values. Those that none of the queries sees are cleared: their weights are 0,
  // but 0 times infinity is not.
  __device__ void load_values() const {
    const bool leads = threadIdx.x % 32 == 0;
    RingPosition<kStages> ring;
    RingPosition<1> landed;
    for_queries([&](const Queries& q) {
      const SequenceSpans spans = spans_of(q);
      for_key_tiles<kKeys>(spans, q.first, q.live, shared.bounds[1], [&](const KeyTile& tile) {
        BufferBarriers& buffer = shared.values[ring.stage];
        const bool clear = !tile.all_visible;
        buffer.wait_empty(ring.parity);
        if (leads) {
          Mbarrier& barrier = clear ? shared.values_landed : buffer.full;
          mbarrier_arrive_expect_tx(barrier, KeyRows::kBytes);
          values(ring.stage).load(p.v, barrier, q.batch, q.kv_head, tile.begin);
        }
        if (clear) {
          uint64_t seen[kKeys / 64];
#pragma unroll
          for (int word = 0; word < kKeys / 64; word++)
            seen[word] = seen_keys(spans, q.first, q.live, tile.begin + 64 * word, tile.end);
          mbarrier_wait_parity(shared.values_landed, landed.parity);
          landed.advance();
          values(ring.stage).clear(seen);
          fence_proxy_async();
          __syncwarp();
          if (leads) mbarrier_arrive(buffer.full);
        }
        ring.advance();
      });
    });
  }

  // ---- the warpgroups that multiply
  // Turns, by two named barriers: a warpgroup starts its products when the other has started its own, so that
  // one does its softmax while the tensor cores work for the other.
  __device__ static void await_turn(int group) { bar_sync(1 + group, 2 * kWarpgroup); }
  __device__ static void pass_turn(int group) { bar_arrive(2 - group, 2 * kWarpgroup); }

  __device__ void start_scores(float (&scores)[kKeys / 8][4], int group, int stage) const {
#pragma unroll
    for (int step = 0; step < kDim / kWgmmaDepth; step++)
      wgmma_mma_async<T, Major::k, Major::k>(scores, queries.k_major(64 * group, step),
                                             keys(stage).k_major(0, step), step > 0);
    wgmma_commit_group();
  }
  __device__ void start_sums(float (&out)[kDim / 8][4], const uint32_t (&weights)[kKeys / 16][4],
                             int stage) const {
#pragma unroll
    for (int step = 0; step < kKeys / kWgmmaDepth; step++)
      wgmma_mma_async<T, Major::mn>(out, weights[step], values(stage).mn_major(step), true);
    wgmma_commit_group();
  }

  __device__ void attend(int group) const {
    const int pair = threadIdx.x % 4;
    const int row = accumulator_row(group);  // and row + 8
    const float scale = p.attention.scale;
    RingPosition<kStages> key_ring, value_ring;
    RingPosition<1> query_ring;
    if (group == 1) pass_turn(group);  // the first is the other's

    for_queries([&](const Queries& q) {
      const SequenceSpans spans = spans_of(q);
      const QuerySpans query_spans[2] = {QuerySpans(spans, q.first + row, row < q.live),
                                         QuerySpans(spans, q.first + row + 8, row + 8 < q.live)};
      OnlineSoftmax<1> softmax(scale);
      float out[1][kDim / 8][4] = {};
      float scores[1][kKeys / 8][4], decay[1][2];
      uint32_t weights[kKeys / 16][4];

      const auto await_keys = [&] {
        shared.keys[key_ring.stage].wait_full(key_ring.parity);
        return shared.tiles[key_ring.stage];
      };
      const auto release_keys = [&](const KeyTile& tile) {
        shared.keys[key_ring.stage].release();
        key_ring.advance();
        if (tile.last) shared.queries.release();
      };
      const auto release_values = [&] {
        shared.values[value_ring.stage].release();
        value_ring.advance();
      };
      const auto weigh = [&](const KeyTile& tile) {
        if (scale < 0.0f) negate(scores);
        if (!tile.all_visible)
          keep_visible(scores[0],
                       {query_spans[0].visible(spans, tile.begin, tile.end, pair),
                        query_spans[1].visible(spans, tile.begin, tile.end, pair)},
                       -INFINITY);
        return softmax.update(scores, decay);
      };

      // S = Q·Kᵀ of the first tile by itself: there are no weights to multiply yet.
      shared.queries.wait_full(query_ring.parity);
      query_ring.advance();
      KeyTile tile = await_keys();
      await_turn(group);
      wgmma_fence(scores[0]);
      start_scores(scores[0], group, key_ring.stage);
      pass_turn(group);
      wgmma_wait_group<0>(scores[0]);
      release_keys(tile);
      weigh(tile);
      pack_columns<T>(weights, scores[0]);

      // Each round issues S of the next tile, then O += P·V of the last one, and works on S while P·V runs:
      // wgmma groups complete in order, so wait_group<1> leaves the younger one, P·V, in flight.
      while (!tile.last) {
        tile = await_keys();
        await_turn(group);
        wgmma_fence(scores[0]);
        start_scores(scores[0], group, key_ring.stage);
        shared.values[value_ring.stage].wait_full(value_ring.parity);
        wgmma_fence(out[0], weights);
        start_sums(out[0], weights, value_ring.stage);
        pass_turn(group);
        wgmma_wait_group<1>(scores[0]);
        release_keys(tile);  // S is done and nothing else reads these keys
        const bool moved = weigh(tile);
        // Twice the same: ptxas (seen with 13.0) moves a wait that all paths share to before the softmax,
        // which then overlaps nothing. The condition is one for the whole warpgroup, which a wait demands;
        // `moved` is a warp's.
        if (tile.all_visible) wgmma_wait_group<0>(out[0]);
        else wgmma_wait_group<0>(out[0]);
        if (moved) scale_rows(out, decay);  // all of O so far is relative to the old shift
        release_values();
        pack_columns<T>(weights, scores[0]);
      }
      // P·V of the last tile, which no S follows. It takes no turn: the other warpgroup may multiply beside
      // it.
      shared.values[value_ring.stage].wait_full(value_ring.parity);
      wgmma_fence(out[0], weights);
      start_sums(out[0], weights, value_ring.stage);
      wgmma_wait_group<0>(out[0]);
      release_values();

      softmax.finish();
      const auto to = head_pointer<T>(p.attention.out, p.attention.out_layout, q.batch, q.head) +
                      q.first * p.attention.out_layout.position_stride;
      float* lse = p.attention.lse +
                   (static_cast<int64_t>(q.batch) * p.attention.q_heads + q.head) * p.attention.q_len +
                   q.first;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int i = row + 8 * half;
        const SoftmaxState& state = softmax.state(0, half);
        store_accumulator_row(to + i * p.attention.out_layout.position_stride, out[0], half,
                              state.inverse_sum(), i < q.live);
        if (pair == 0 && i < q.live) lse[i] = state.log_sum_exp();
      }
    });
    if (group == 0) await_turn(group);  // every turn that was passed is taken
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(ForwardTiles<kDim>::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  using Tiles = ForwardTiles<kDim>;
  using Role = Forward<T, kDim>;

  // ---- shared memory plan: queries, kStages of keys, kStages of values
  unsigned char* panels = panel_shared();
  __shared__ typename Role::Shared shared;
  const Role role{p, shared, {panels}, panels + Role::QueryRows::kBytes};

  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = Tiles::kConsumers * kWarpgroup / 32;
    shared.queries.init(kConsumerWarps);
    for (int stage = 0; stage < Tiles::kStages; stage++) {
      shared.keys[stage].init(kConsumerWarps);
      shared.values[stage].init(kConsumerWarps);
    }
    mbarrier_init(shared.values_landed, 1);
    fence_mbarrier_init();
  }
  __syncthreads();

  // ---- roles
  if (threadIdx.x < kWarpgroup) {
    setmaxnreg_dec<Tiles::kProducerRegisters>();
    if (threadIdx.x / 32 == 0) role.load_queries_and_keys();
    if (threadIdx.x / 32 == 1) role.load_values();
  } else {
    setmaxnreg_inc<Tiles::kConsumerRegisters>();
    role.attend(threadIdx.x / kWarpgroup - 1);
  }
}

template <class T, int kDim>
cudaError_t launch_forward_kernel(const ForwardParams& p, int ctas, cudaStream_t stream) {
  using Tiles = ForwardTiles<kDim>;
  return launch_ctas(forward_kernel<T, kDim>, ctas, Tiles::kThreads, Tiles::kSharedBytes, stream, p);
}

}  // namespace dllm::cuda::sm90
