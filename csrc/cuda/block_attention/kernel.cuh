// block_attention forward in plain CUDA: a CTA takes 32 queries of one head past the keys they see, 32 at a
// time, with an online softmax in base 2. float32 arithmetic on the CUDA cores, any GPU, any head dim.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/params.h"
#include "core/softmax_state.h"
#include "core/span_mask.h"
#include "cuda/block_attention/config.h"
#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"

namespace dllm::cuda {

__device__ inline float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ inline float4 load4(const __nv_bfloat16* from) {
  const uint2 bits = *reinterpret_cast<const uint2*>(from);
  return {__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u), __uint_as_float(bits.y << 16),
          __uint_as_float(bits.y & 0xffff0000u)};
}
__device__ inline float4 load4(const __half* from) {
  const __half2* pairs = reinterpret_cast<const __half2*>(from);
  const float2 low = __half22float2(pairs[0]), high = __half22float2(pairs[1]);
  return {low.x, low.y, high.x, high.y};
}

__device__ inline void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
__device__ inline void store4(__nv_bfloat16* to, float4 x) {
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(to);
  pairs[0] = __floats2bfloat162_rn(x.x, x.y);
  pairs[1] = __floats2bfloat162_rn(x.z, x.w);
}
__device__ inline void store4(__half* to, float4 x) {
  __half2* pairs = reinterpret_cast<__half2*>(to);
  pairs[0] = __floats2half2_rn(x.x, x.y);
  pairs[1] = __floats2half2_rn(x.z, x.w);
}

__device__ inline float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
__device__ inline float4 scaled(float4 a, float b) { return {a.x * b, a.y * b, a.z * b, a.w * b}; }
__device__ inline float4 add_scaled(float4 sum, float4 a, float b) {
  return {fmaf(a.x, b, sum.x), fmaf(a.y, b, sum.y), fmaf(a.z, b, sum.z), fmaf(a.w, b, sum.w)};
}

// 32 rows of a tensor into shared memory, times `factor`; rows whose bit is not set become 0.
template <int kDim, typename T>
__device__ inline void load_rows(const T* from, int64_t stride, unsigned rows, int dim, float factor,
                                 float* to) {
  constexpr int kGroups = kDim / 4;
  for (int i = threadIdx.x; i < 32 * kGroups; i += kThreads) {
    const int row = i / kGroups, d = i % kGroups * 4;
    float4 x = {0, 0, 0, 0};
    if ((rows >> row & 1) && d < dim) x = scaled(load4(from + row * stride + d), factor);
    store4(to + row * kRowWords<kDim> + d, x);
  }
}

__device__ inline unsigned first_rows(int count) { return count >= 32 ? ~0u : (1u << max(count, 0)) - 1; }

// The spans of one sequence, cut to the keys there are.
struct SequenceSpans {
  const int32_t* data;  // null: every query sees all keys
  int64_t row_stride;
  int count, kv_len;

  __device__ int2 at(int position, int r) const {
    if (!data) return {0, kv_len};
    const int32_t* span = data + position * row_stride + r * 2;
    return {max(span[0], 0), min(span[1], kv_len)};
  }
  __device__ bool sees(int position, int key) const {
    bool seen = false;
    for (int r = 0; r < count; r++) {
      const int2 span = at(position, r);
      seen |= span.x <= key && key < span.y;
    }
    return seen;
  }
};

// Called by one warp, a query per lane; every lane gets all bounds of the tile into shared memory.
__device__ inline void tile_bounds(const SequenceSpans& spans, int position, bool live, SpanBounds* bounds) {
  SpanBounds sum = no_rows();
  for (int r = 0; r < spans.count; r++) {
    if (r < kMaxSpanBounds) sum = no_rows();
    if (live) {
      const int2 span = spans.at(position, r);
      include(sum, span.x, span.y);
    }
    const SpanBounds tile = {__reduce_min_sync(~0u, sum.min_start), __reduce_max_sync(~0u, sum.max_start),
                             r < kMaxSpanBounds ? __reduce_min_sync(~0u, sum.min_end) : INT_MIN,
                             __reduce_max_sync(~0u, sum.max_end)};
    if (threadIdx.x == 0) bounds[min(r, kMaxSpanBounds - 1)] = tile;
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) block_attention_kernel(const BlockAttentionParams p) {
  // ---- shared memory plan
  constexpr int kRow = kRowWords<kDim>, kWeightRow = kRowWords<kKeys>;
  float* query = dynamic_shared<float>();  // [kQueries][kRow], times scale and log2 e
  float* tile = query + kQueries * kRow;   // [kKeys][kRow]: keys, then values
  float* weights = tile + kKeys * kRow;    // [kQueries][kWeightRow]
  __shared__ SpanBounds bounds[kMaxSpanBounds];
  __shared__ unsigned seen;  // bit k: some query of the tile sees key k of this range

  // ---- which queries
  const int tiles = (p.q_len + kQueries - 1) / kQueries;
  const int first = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * kQueries;  // longest first
  const int head = blockIdx.x / tiles % p.q_heads;
  const int64_t batch = blockIdx.x / tiles / p.q_heads;
  const int kv_head = head / (p.q_heads / p.kv_heads);
  const int live = min(p.q_len - first, kQueries);
  const T* q = static_cast<const T*>(p.q) + batch * p.q_layout.batch_stride + head * p.q_layout.head_stride +
               first * p.q_layout.position_stride;
  const T* k =
      static_cast<const T*>(p.k) + batch * p.k_layout.batch_stride + kv_head * p.k_layout.head_stride;
  const T* v =
      static_cast<const T*>(p.v) + batch * p.v_layout.batch_stride + kv_head * p.v_layout.head_stride;
  const SequenceSpans spans = {p.spans.data ? p.spans.data + batch * p.spans.batch_stride : nullptr,
                               p.spans.row_stride, p.spans.count, p.kv_len};
  const int span_bounds = min(p.spans.count, kMaxSpanBounds);

  const int column = threadIdx.x % kRowThreads;
  const int row = threadIdx.x / kRowThreads * kThreadQueries;  // the first of this thread's queries
  load_rows<kDim>(q, p.q_layout.position_stride, first_rows(live), p.head_dim, p.scale * 1.44269504f, query);
  if (threadIdx.x < 32) tile_bounds(spans, first + threadIdx.x, static_cast<int>(threadIdx.x) < live, bounds);
  __syncthreads();

  // ---- main loop over the key ranges that some query sees
  SoftmaxState state[kThreadQueries];
  float4 out[kThreadQueries][kDim / 64] = {};
  KeyRange keys = next_keys(bounds, span_bounds, 0, kKeys);
  for (; keys.begin < keys.end; keys = next_keys(bounds, span_bounds, keys.end, kKeys)) {
    const unsigned present = first_rows(keys.end - keys.begin);
    load_rows<kDim>(k + keys.begin * p.k_layout.position_stride, p.k_layout.position_stride, present,
                    p.head_dim, 1.0f, tile);
    if (threadIdx.x == 0) seen = keys.full ? present : 0;
    __syncthreads();

    float scores[kThreadQueries][kThreadKeys] = {};
#pragma unroll 2
    for (int d = 0; d < p.head_dim; d += 4) {
      float4 key[kThreadKeys];
#pragma unroll
      for (int j = 0; j < kThreadKeys; j++) key[j] = load4(tile + (column + j * kRowThreads) * kRow + d);
#pragma unroll
      for (int i = 0; i < kThreadQueries; i++) {
        const float4 x = load4(query + (row + i) * kRow + d);
#pragma unroll
        for (int j = 0; j < kThreadKeys; j++) scores[i][j] = dot(x, key[j], scores[i][j]);
      }
    }

    unsigned seen_here = 0;
#pragma unroll
    for (int j = 0; j < kThreadKeys; j++) {
      const int key = column + j * kRowThreads;
#pragma unroll
      for (int i = 0; i < kThreadQueries; i++) {
        const bool visible = (present >> key & 1) &&
                             (keys.full || (row + i < live && spans.sees(first + row + i, keys.begin + key)));
        if (!visible) scores[i][j] = -INFINITY;
        seen_here |= static_cast<unsigned>(visible) << key;
      }
    }
    if (!keys.full) {
      seen_here = __reduce_or_sync(~0u, seen_here);
      if (threadIdx.x % 32 == 0) atomicOr(&seen, seen_here);
    }

#pragma unroll
    for (int i = 0; i < kThreadQueries; i++) {
      SoftmaxState next = state[i];
#pragma unroll
      for (int j = 0; j < kThreadKeys; j++) next.max = fmaxf(next.max, scores[i][j]);
#pragma unroll
      for (int lane = kRowThreads / 2; lane > 0; lane /= 2)
        next.max = fmaxf(next.max, __shfl_xor_sync(~0u, next.max, lane));
      const float decay = exp2f(state[i].max - next.shift());
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kThreadKeys; j++) {
        const float weight = exp2f(scores[i][j] - next.shift());
        weights[(row + i) * kWeightRow + column + j * kRowThreads] = weight;
        sum += weight;
      }
#pragma unroll
      for (int lane = kRowThreads / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
      next.sum = fmaf(state[i].sum, decay, sum);
      state[i] = next;
#pragma unroll
      for (int c = 0; c < kDim / 64; c++) out[i][c] = scaled(out[i][c], decay);
    }

    __syncthreads();  // keys are read, weights and `seen` are written
    load_rows<kDim>(v + keys.begin * p.v_layout.position_stride, p.v_layout.position_stride, seen, p.head_dim,
                    1.0f, tile);
    __syncthreads();
    for (int key = 0; key < kKeys; key++) {
      float weight[kThreadQueries];
#pragma unroll
      for (int i = 0; i < kThreadQueries; i++) weight[i] = weights[(row + i) * kWeightRow + key];
#pragma unroll
      for (int c = 0; c < kDim / 64; c++) {
        const float4 value = load4(tile + key * kRow + c * 64 + column * 4);
#pragma unroll
        for (int i = 0; i < kThreadQueries; i++) out[i][c] = add_scaled(out[i][c], value, weight[i]);
      }
    }
    __syncthreads();  // the next keys overwrite the values
  }

  // ---- epilogue
#pragma unroll
  for (int i = 0; i < kThreadQueries; i++) {
    const int position = first + row + i;
    if (row + i >= live) continue;
    T* to = static_cast<T*>(p.out) + batch * p.out_layout.batch_stride + head * p.out_layout.head_stride +
            position * p.out_layout.position_stride;
#pragma unroll
    for (int c = 0; c < kDim / 64; c++) {
      const int d = c * 64 + column * 4;
      if (d < p.head_dim) store4(to + d, scaled(out[i][c], state[i].inverse_sum()));
    }
    if (column == 0) p.lse[(batch * p.q_heads + head) * p.q_len + position] = state[i].log_sum_exp();
  }
}

template <typename T, int kDim>
cudaError_t launch_for_dim(const BlockAttentionParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.q_len + kQueries - 1) / kQueries;
  const int64_t blocks = tiles * p.q_heads * p.batch;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_kernel(block_attention_kernel<T, kDim>, static_cast<unsigned>(blocks), kThreads,
                       kSharedBytes<kDim>, stream, p);
}

template <typename T>
cudaError_t launch_for_type(const BlockAttentionParams& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch_for_dim<T, 64>(p, stream);
  if (p.head_dim <= 128) return launch_for_dim<T, 128>(p, stream);
  return launch_for_dim<T, 256>(p, stream);
}

}  // namespace dllm::cuda
