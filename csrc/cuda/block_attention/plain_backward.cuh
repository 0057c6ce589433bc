// Gradients of block_attention in float32 on the CUDA cores, by the same two passes as on tensor cores: a CTA
// owns 32 keys or 32 queries and takes in the other side, whose rows pass through one tile of shared memory.
#pragma once

#include "cuda/attention/head_rows.cuh"
#include "cuda/attention/span_rows.cuh"
#include "cuda/block_attention/launch.h"
#include "cuda/block_attention/plain_rows.cuh"
#include "cuda/block_attention/query_walk.cuh"
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"

namespace dllm::cuda {

// Shared memory of a CTA, and what it does with a tile of the other side: its own rows a, c and the partners'
// b, d are {q, dO} and {k, v} for gradients of queries, {k, v} and {q, dO} for those of keys and values.
template <int kDim>
struct PlainGradients {
  static constexpr int kPartners = kPlainPartners<kDim>, kThreadPartners = kPartners / kPlainRowThreads;
  static constexpr int kRow = kRowWords<kDim>, kWeightRow = kRowWords<kPartners>;

  float* a = dynamic_shared<float>();                // [kPlainRows][kRow]
  float* c = a + kPlainRows * kRow;                  // the same
  float* tile = c + kPlainRows * kRow;               // [kPartners][kRow]: b, d, and b again
  float* weights = tile + kPartners * kRow;          // [kPlainRows][kWeightRow]: P
  float* grads = weights + kPlainRows * kWeightRow;  // dS
  int column = threadIdx.x % kPlainRowThreads;
  int row = threadIdx.x / kPlainRowThreads * kPlainThreadRows;

  // sum_d += P d where `for_keys`, sum_b += dS b; b(i) and d(i) find rows; terms and visible as
  // score_gradients'.
  template <bool for_keys, class B, class D, class Terms, class Visible>
  __device__ void add(const BlockAttentionParams& f, B b, D d, Terms terms, Visible visible,
                      float4 (&sum_b)[kPlainThreadRows][kDim / 64],
                      float4 (&sum_d)[kPlainThreadRows][kDim / 64]) {
    load_rows<kDim, kPartners>(f.head_dim, 1.0f, tile, b);
    __syncthreads();
    float scores[kPlainThreadRows][kThreadPartners] = {}, score_grads[kPlainThreadRows][kThreadPartners] = {};
    add_row_products<kDim>(scores, a, row, tile, column, f.head_dim);
    __syncthreads();
    load_rows<kDim, kPartners>(f.head_dim, 1.0f, tile, d);
    __syncthreads();
    add_row_products<kDim>(score_grads, c, row, tile, column, f.head_dim);
#pragma unroll
    for (int i = 0; i < kPlainThreadRows; i++) {
#pragma unroll
      for (int j = 0; j < kThreadPartners; j++) {
        const int partner = column + j * kPlainRowThreads;
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
    load_rows<kDim, kPartners>(f.head_dim, 1.0f, tile, b);
    __syncthreads();
    add_weighted_rows<kDim, kPartners>(sum_b, grads, row, tile, column);
    __syncthreads();
  }

  // The first `live` rows, times `factor`.
  __device__ void store(const float4 (&sums)[kPlainThreadRows][kDim / 64], float factor, int live, int dim,
                        float* to, int64_t stride) const {
#pragma unroll
    for (int i = 0; i < kPlainThreadRows; i++) {
#pragma unroll
      for (int n = 0; n < kDim / 64; n++) {
        const int d = n * 64 + column * 4;
        if (row + i < live && d < dim) store4(to + (row + i) * stride + d, scaled(sums[i][n], factor));
      }
    }
  }
};

template <int kDim>
__global__ void __launch_bounds__(kPlainThreads, 1)
    plain_query_gradients_kernel(const BlockAttentionBackwardParams p, const BackwardWorkspace workspace) {
  constexpr int kKeys = kPlainPartners<kDim>;
  const BlockAttentionParams& f = p.forward;
  PlainGradients<kDim> shared;
  __shared__ SpanBounds bounds[kMaxSpanBounds];
  __shared__ VisibleKeys<kPlainRows, kPlainThreads> visible;

  // ---- which queries
  const int tiles = (f.q_len + kPlainRows - 1) / kPlainRows;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * kPlainRows;  // longest first
  const int head = blockIdx.x / tiles % f.q_heads;
  const int64_t batch = blockIdx.x / tiles / f.q_heads;
  const int kv_head = head / (f.q_heads / f.kv_heads);
  const int live = min(f.q_len - first, kPlainRows);
  const float* q = rows_of<float>(f.q, f.q_layout, batch, head);
  const float* grad_out = rows_of<float>(p.grad_out, p.grad_out_layout, batch, head);
  const float* k = rows_of<float>(f.k, f.k_layout, batch, kv_head);
  const float* v = rows_of<float>(f.v, f.v_layout, batch, kv_head);
  const float2* terms = workspace.terms + (batch * f.q_heads + head) * workspace.padded_queries + first;
  const SequenceSpans spans(f.spans, batch, f.kv_len);
  load_rows<kDim, kPlainRows>(f.head_dim, 1.0f, shared.a, [&](int i) {
    return i < live ? q + (first + i) * f.q_layout.position_stride : nullptr;
  });
  load_rows<kDim, kPlainRows>(f.head_dim, 1.0f, shared.c, [&](int i) {
    return i < live ? grad_out + (first + i) * p.grad_out_layout.position_stride : nullptr;
  });
  if (threadIdx.x < 32) tile_bounds(spans, first, live, bounds);
  __syncthreads();

  // ---- main loop over the key ranges that some query sees
  float4 grad_q[kPlainThreadRows][kDim / 64] = {}, none[kPlainThreadRows][kDim / 64];
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
      rows_of<float>(p.grad_q, p.grad_q_layout, batch, head) + first * p.grad_q_layout.position_stride,
      p.grad_q_layout.position_stride);
}

template <int kDim>
__global__ void __launch_bounds__(kPlainThreads, 1)
    plain_key_gradients_kernel(const BlockAttentionBackwardParams p, const BackwardWorkspace workspace) {
  constexpr int kQueries = kPlainPartners<kDim>;
  const BlockAttentionParams& f = p.forward;
  PlainGradients<kDim> shared;
  __shared__ VisibleKeys<kQueries, kPlainThreads> visible;
  __shared__ QueryList<kPlainThreads> list;

  // ---- which keys
  const int tiles = (f.kv_len + kPlainRows - 1) / kPlainRows;
  const int first = static_cast<int>(blockIdx.x % tiles) * kPlainRows;
  const int kv_head = blockIdx.x / tiles % f.kv_heads, group = f.q_heads / f.kv_heads;
  const int64_t batch = blockIdx.x / tiles / f.kv_heads;
  const int live = min(f.kv_len - first, kPlainRows);
  const float* k = rows_of<float>(f.k, f.k_layout, batch, kv_head);
  const float* v = rows_of<float>(f.v, f.v_layout, batch, kv_head);
  const SequenceSpans spans(f.spans, batch, f.kv_len);
  load_rows<kDim, kPlainRows>(f.head_dim, 1.0f, shared.a, [&](int i) {
    return i < live ? k + (first + i) * f.k_layout.position_stride : nullptr;
  });
  load_rows<kDim, kPlainRows>(f.head_dim, 1.0f, shared.c, [&](int i) {
    return i < live ? v + (first + i) * f.v_layout.position_stride : nullptr;
  });

  // ---- main loop over the query tiles that see some of the keys
  float4 grad_k[kPlainThreadRows][kDim / 64] = {}, grad_v[kPlainThreadRows][kDim / 64] = {};
  QueryWalk<kQueries, kPlainThreads> walk(list, bounds_of(workspace, f, batch), spans.bounds_count(), f.q_len,
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
                 ? rows_of<float>(data, layout, batch, head) + (range.first + i) * layout.position_stride
                 : nullptr;
    };
    shared.template add<true>(
        f, [&](int i) { return query_row(f.q, f.q_layout, i); },
        [&](int i) { return query_row(p.grad_out, p.grad_out_layout, i); },
        [&](int, int query) { return terms[query]; },
        [&](int key, int query) { return (visible.of_query[query] >> key & 1) != 0; }, grad_k, grad_v);
  }
  const auto store = [&](const float4(&sums)[kPlainThreadRows][kDim / 64], float factor, void* to) {
    shared.store(
        sums, factor, live, f.head_dim,
        rows_of<float>(to, p.grad_kv_layout, batch, kv_head) + first * p.grad_kv_layout.position_stride,
        p.grad_kv_layout.position_stride);
  };
  store(grad_k, f.scale, p.grad_k);
  store(grad_v, 1.0f, p.grad_v);
}

template <int kDim>
cudaError_t launch_plain_backward(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                                  cudaStream_t stream) {
  const BlockAttentionParams& f = p.forward;
  const int64_t key_tiles = (f.kv_len + kPlainRows - 1) / kPlainRows;
  const int64_t query_tiles = (f.q_len + kPlainRows - 1) / kPlainRows;
  const cudaError_t status = launch_ctas(plain_key_gradients_kernel<kDim>, key_tiles * f.kv_heads * f.batch,
                                         kPlainThreads, kPlainBackwardBytes<kDim>, stream, p, workspace);
  if (status != cudaSuccess) return status;
  return launch_ctas(plain_query_gradients_kernel<kDim>, query_tiles * f.q_heads * f.batch, kPlainThreads,
                     kPlainBackwardBytes<kDim>, stream, p, workspace);
}

}  // namespace dllm::cuda
