// What a step does to its fresh tokens on the way: rotation of queries and keys, and the writes into pages.
#pragma once

#include "cuda/cached_attention/launch.h"
#include "cuda/rotate_half/rotated.cuh"
#include "cuda/tiles/head_pointer.cuh"
#include "cuda/tiles/shared_tile.cuh"

namespace dllm::cuda {

constexpr int kChunk = 8;  // 16-bit values of an access

// Rotates a chunk of the first half of a head and the one in its place in the second half; column: of the
// first.
template <class T>
__device__ void rotate_chunks(T* to_first, T* to_second, const T* first, const T* second,
                              const Rotation& rotation, int half, int64_t batch, int position, int column) {
  const T* cos = static_cast<const T*>(rotation.cos) + batch * rotation.cos_batch_stride +
                 position * rotation.cos_position_stride + column;
  const T* sin = static_cast<const T*>(rotation.sin) + batch * rotation.sin_batch_stride +
                 position * rotation.sin_position_stride + column;
  float x[kChunk], y[kChunk], a[kChunk], b[kChunk], out[kChunk];
  load_values(x, first);
  load_values(y, second);
  load_values(a, cos);
  load_values(b, sin);
#pragma unroll
  for (int j = 0; j < kChunk; j++) out[j] = rotated<T>(x[j], -y[j], a[j], b[j]);
  load_values(a, cos + half);
  load_values(b, sin + half);
  store_values(to_first, out);
#pragma unroll
  for (int j = 0; j < kChunk; j++) out[j] = rotated<T>(y[j], x[j], a[j], b[j]);
  store_values(to_second, out);
}

// Rotates rows of a tile in place, with all threads of the CTA. position(row): of its token; negative: the
// row stays as it is.
template <int kThreads, int kRows, class T, int kDim, class Position>
__device__ void rotate_rows(const SharedTile<T, kDim>& tile, const Rotation& rotation, int head_dim,
                            int64_t batch, Position position) {
  const int chunks = head_dim / (2 * kChunk);  // of half a head
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * chunks; i += kThreads) {
    const int row = i / chunks, c = i % chunks, at = position(row);
    if (at < 0) continue;
    T *const first = tile.chunk(row, c), *const second = tile.chunk(row, chunks + c);
    rotate_chunks(first, second, first, second, rotation, head_dim / 2, batch, at, c * kChunk);
  }
}

// Whether a token after `t` has its position; the same in all lanes of a warp.
__device__ inline bool is_written_later(const int32_t* positions, int t, int length) {
  bool found = false;
  for (int later = t + 1 + static_cast<int>(threadIdx.x % 32); later < length; later += 32)
    found |= positions[later] == positions[t];
  return __any_sync(~0u, found);
}

// Leaves keys, rotated, and values of tokens [from, end) of a kv head in their pages, as kv_write_ does: a
// warp for each token.
template <class T>
__device__ void write_tokens(const SplitParams& split_params, int64_t batch, int kv_head, int from, int end) {
  const CachedAttentionParams& p = split_params.attention;
  const FreshWrites& writes = split_params.writes;
  const int32_t* positions = writes.positions + batch * p.q_len;
  const int lane = threadIdx.x % 32, chunks = p.head_dim / kChunk;
#pragma unroll 1
  for (int t = from + static_cast<int>(threadIdx.x / 32); t < end; t += static_cast<int>(blockDim.x / 32)) {
    const int position = positions[t];
    if (position < 0 || position / p.page_size >= p.table_length) continue;
    const int page = p.page_table[batch * p.table_length + position / p.page_size];
    if (page < 0 || page >= p.pages || is_written_later(positions, t, p.q_len)) continue;
    const auto slot = [&](void* cache, const PagesLayout& layout) {
      return static_cast<T*>(cache) + page * layout.page_stride +
             position % p.page_size * layout.slot_stride + kv_head * layout.head_stride;
    };
    const auto copy = [](T* to, const T* from) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    };
    const T* key = head_pointer<T>(p.k, p.k_layout, batch, kv_head) + t * p.k_layout.position_stride;
    const T* value = head_pointer<T>(p.v, p.v_layout, batch, kv_head) + t * p.v_layout.position_stride;
    T *const to_key = slot(writes.cache_k, p.cache_k_layout), *const to_value =
                                                                  slot(writes.cache_v, p.cache_v_layout);
    for (int c = lane; c < chunks; c += 32) {
      const int column = c * kChunk, half = p.head_dim / 2;
      copy(to_value + column, value + column);
      if (!split_params.rotation.cos) copy(to_key + column, key + column);
      else if (c < chunks / 2)
        rotate_chunks(to_key + column, to_key + half + column, key + column, key + half + column,
                      split_params.rotation, half, batch, t, column);
    }
  }
}

}  // namespace dllm::cuda
