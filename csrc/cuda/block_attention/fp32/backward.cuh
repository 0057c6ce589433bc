// Gradients of block_attention in float32 on the CUDA cores, by the same two passes as on tensor cores: a CTA
// owns 32 keys or 32 queries and takes in the other side, whose rows pass through one tile of shared memory.
#pragma once

#include "cuda/block_attention/fp32/launch.h"
#include "cuda/block_attention/fp32/tile_products.cuh"
#include "cuda/block_attention/query_walk.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"
#include "cuda/tiles/head_pointer.cuh"
#include "cuda/tiles/sequence_spans.cuh"

namespace dllm::cuda::fp32 {

// Shared memory of a CTA, and what it does with a tile of the other side: its own rows a, c and the partners'
// b, d are {q, dO} and {k, v} for gradients of queries, {k, v} and {q, dO} for those of keys and values.
template <int kDim>
struct BackwardTiles {
  static constexpr int kPartners = kPartnerRows<kDim>, kThreadPartners = kPartners / kRowThreads;
  static constexpr int kRow = kRowWords<kDim>, kWeightRow = kRowWords<kPartners>;

  float* a = dynamic_shared<float>();               // [kTileRows][kRow]
  float* c = a + kTileRows * kRow;                  // the same
  float* tile = c + kTileRows * kRow;               // [kPartners][kRow]: b, d, and b again
  float* weights = tile + kPartners * kRow;         // [kTileRows][kWeightRow]: P
  float* grads = weights + kTileRows * kWeightRow;  // dS
  int column = threadIdx.x % kRowThreads;
  int row = threadIdx.x / kRowThreads * kThreadRows;

  // sum_d += P d where `for_keys`, sum_b += dS b; b(i) and d(i) find rows; terms and visible as
  // score_gradients'.
  template <bool for_keys, class B, class D, class Terms, class Visible>
  __device__ void add(const BlockAttentionParams& f, B b, D d, Terms terms, Visible visible,
                      float4 (&sum_b)[kThreadRows][kDim / 64], float4 (&sum_d)[kThreadRows][kDim / 64]) {
    load_tile<kDim, kPartners>(f.head_dim, 1.0f, tile, b);
    __syncthreads();
    float scores[kThreadRows][kThreadPartners] = {}, score_grads[kThreadRows][kThreadPartners] = {};
    add_row_products<kDim>(scores, a, row, tile, column, f.head_dim);
    __syncthreads();
    load_tile<kDim, kPartners>(f.head_dim, 1.0f, tile, d);
    __syncthreads();
    add_row_products<kDim>(score_grads, c, row, tile, column, f.head_dim);
#pragma unroll
    for (int i = 0; i < kThreadRows; i++) {
#pragma unroll
      for (int j = 0; j < kThreadPartners; j++) {
        const int partner = column + j * kRowThreads;
        const float2 term = terms(row + i, partner);
        const bool seen = visible(row + i, partner);
        const float weight = exp2f(fmaf(scores[i][j], f.scale * 1.44269504f, -term.x));
        weights[(row + i) * kWeightRow + partner] = seen ? weight : 0.0f;
        grads[(row + i) * kWeightRow + partner] = seen ? weight * (score_grads[i][j] - term.y) : 0.0f;
      }
    }
    __syncthreads();
    if constexpr (for_keys) add_weighted_rows<kDim, kPartners>(sum_d, weights, row, tile, column);
    __syncthreads();
    load_tile<kDim, kPartners>(f.head_dim, 1.0f, tile, b);
    __syncthreads();
    add_weighted_rows<kDim, kPartners>(sum_b, grads, row, tile, column);
    __syncthreads();
  }

  // The first `live` rows, times `factor`.
  __device__ void store(const float4 (&sums)[kThreadRows][kDim / 64], float factor, int live, int dim,
                        float* to, int64_t stride) const {
#pragma unroll
    for (int i = 0; i < kThreadRows; i++) {
#pragma unroll
      for (int n = 0; n < kDim / 64; n++) {
        const int d = n * 64 + column * 4;
        if (row + i < live && d < dim) store4(to + (row + i) * stride + d, scaled(sums[i][n], factor));
      }
    }
  }
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    backward_dq_kernel(const BlockAttentionBackwardParams p, const BackwardWorkspace workspace) {
  constexpr int kKeys = kPartnerRows<kDim>;
  const BlockAttentionParams& f = p.forward;
  BackwardTiles<kDim> shared;
  __shared__ SpanBounds bounds[kMaxSpanBounds];
  __shared__ VisibleKeys<kTileRows, kThreads> visible;

  // ---- which queries
  const int tiles = (f.q_len + kTileRows - 1) / kTileRows;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * kTileRows;  // longest first
  const int head = blockIdx.x / tiles % f.q_heads;
  const int64_t batch = blockIdx.x / tiles / f.q_heads;
  const int kv_head = head / (f.q_heads / f.kv_heads);
  const int live = min(f.q_len - first, kTileRows);
  const float* q = head_pointer<float>(f.q, f.q_layout, batch, head);
  const float* grad_out = head_pointer<float>(p.grad_out, p.grad_out_layout, batch, head);
  const float* k = head_pointer<float>(f.k, f.k_layout, batch, kv_head);
  const float* v = head_pointer<float>(f.v, f.v_layout, batch, kv_head);
  const float2* terms = workspace.terms + (batch * f.q_heads + head) * workspace.padded_queries + first;
  const SequenceSpans spans(f.spans, batch, f.kv_len);
  load_tile<kDim, kTileRows>(f.head_dim, 1.0f, shared.a, [&](int i) {
    return i < live ? q + (first + i) * f.q_layout.position_stride : nullptr;
  });
  load_tile<kDim, kTileRows>(f.head_dim, 1.0f, shared.c, [&](int i) {
    return i < live ? grad_out + (first + i) * p.grad_out_layout.position_stride : nullptr;
  });
  if (threadIdx.x < 32) tile_bounds(spans, first, live, bounds);
  __syncthreads();

  // ---- main loop over the key ranges that some query sees
  float4 grad_q[kThreadRows][kDim / 64] = {}, none[kThreadRows][kDim / 64];
  KeyWalk walk(bounds, spans.bounds_count(), kKeys);
  for (KeyRange range = walk.next(); range.begin < range.end; range = walk.next()) {
    const uint64_t seen =
        visible.mark([&](int i) { return i < live ? spans.visible_keys(first + i, range) : 0; });
    const auto key_row = [&](const float* rows, const HeadsLayout& layout, int i) {
      return seen >> i & 1 ? rows + (range.begin + i) * layout.position_stride : nullptr;
    };
    shared.template add<false>(
        f, [&](int i) { return key_row(k, f.k_layout, i); }, [&](int i) { return key_row(v, f.v_layout, i); },
        [&](int query, int) { return terms[query]; },
        [&](int query, int key) { return (visible.of_query[query] >> key & 1) != 0; }, grad_q, none);
  }
  shared.store(
      grad_q, f.scale, live, f.head_dim,
      head_pointer<float>(p.grad_q, p.grad_q_layout, batch, head) + first * p.grad_q_layout.position_stride,
      p.grad_q_layout.position_stride);
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    backward_dkv_kernel(const BlockAttentionBackwardParams p, const BackwardWorkspace workspace) {
  constexpr int kQueries = kPartnerRows<kDim>;
  const BlockAttentionParams& f = p.forward;
  BackwardTiles<kDim> shared;
  __shared__ VisibleKeys<kQueries, kThreads> visible;
  __shared__ QueryList<kThreads> list;

  // ---- which keys
  const int tiles = (f.kv_len + kTileRows - 1) / kTileRows;
  const int first = static_cast<int>(blockIdx.x % tiles) * kTileRows;
  const int kv_head = blockIdx.x / tiles % f.kv_heads, group = f.q_heads / f.kv_heads;
  const int64_t batch = blockIdx.x / tiles / f.kv_heads;
  const int live = min(f.kv_len - first, kTileRows);
  const float* k = head_pointer<float>(f.k, f.k_layout, batch, kv_head);
  const float* v = head_pointer<float>(f.v, f.v_layout, batch, kv_head);
  const SequenceSpans spans(f.spans, batch, f.kv_len);
  load_tile<kDim, kTileRows>(f.head_dim, 1.0f, shared.a, [&](int i) {
    return i < live ? k + (first + i) * f.k_layout.position_stride : nullptr;
  });
  load_tile<kDim, kTileRows>(f.head_dim, 1.0f, shared.c, [&](int i) {
    return i < live ? v + (first + i) * f.v_layout.position_stride : nullptr;
  });

  // ---- main loop over the query tiles that see some of the keys
  float4 grad_k[kThreadRows][kDim / 64] = {}, grad_v[kThreadRows][kDim / 64] = {};
  QueryWalk<kQueries, kThreads> walk(list, bounds_of(workspace, f, batch), spans.bounds_count(), f.q_len,
                                     group, first, first + live);
  for (QueryRange range = walk.next(); range.count > 0; range = walk.next()) {
    const int head = kv_head * group + range.head;
    const float2* terms =
        workspace.terms + (batch * f.q_heads + head) * workspace.padded_queries + range.first;
    visible.mark([&](int i) {
      return i < range.count ? spans.visible_keys(range.first + i, {first, first + live, false}) : 0;
    });
    const auto query_row = [&](const void* data, const HeadsLayout& layout, int i) {
      return visible.of_query[i]
                 ? head_pointer<float>(data, layout, batch, head) + (range.first + i) * layout.position_stride
                 : nullptr;
    };
    shared.template add<true>(
        f, [&](int i) { return query_row(f.q, f.q_layout, i); },
        [&](int i) { return query_row(p.grad_out, p.grad_out_layout, i); },
        [&](int, int query) { return terms[query]; },
        [&](int key, int query) { return (visible.of_query[query] >> key & 1) != 0; }, grad_k, grad_v);
  }
  const auto store = [&](const float4(&sums)[kThreadRows][kDim / 64], float factor, void* to) {
    shared.store(
        sums, factor, live, f.head_dim,
        head_pointer<float>(to, p.grad_kv_layout, batch, kv_head) + first * p.grad_kv_layout.position_stride,
        p.grad_kv_layout.position_stride);
  };
  store(grad_k, f.scale, p.grad_k);
  store(grad_v, 1.0f, p.grad_v);
}

template <int kDim>
cudaError_t launch_backward(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                            cudaStream_t stream) {
  const BlockAttentionParams& f = p.forward;
  const int64_t key_tiles = (f.kv_len + kTileRows - 1) / kTileRows;
  const int64_t query_tiles = (f.q_len + kTileRows - 1) / kTileRows;
  const cudaError_t status = launch_ctas(backward_dkv_kernel<kDim>, key_tiles * f.kv_heads * f.batch,
                                         kThreads, kBackwardBytes<kDim>, stream, p, workspace);
  if (status != cudaSuccess) return status;
  return launch_ctas(backward_dq_kernel<kDim>, query_tiles * f.q_heads * f.batch, kThreads,
                     kBackwardBytes<kDim>, stream, p, workspace);
}

}  // namespace dllm::cuda::fp32
