// kv_write_ on CUDA: one CTA per token copies its keys and values, all heads, in words of 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include "core/params.h"
#include "cuda/ptx.cuh"

namespace dllm::cuda {

constexpr int kWriteThreads = 128;

// Of two tokens of a sequence for one slot the later one stays: whether a token after `t` has this position.
__device__ inline bool written_later(const int32_t* positions, int t, int length) {
  bool found = false;
  for (int later = t + 1 + static_cast<int>(threadIdx.x); later < length; later += kWriteThreads)
    found |= positions[later] == positions[t];
  return __syncthreads_or(found);
}

template <class Word>
__global__ void __launch_bounds__(kWriteThreads) kv_write_kernel(const __grid_constant__ KvWriteParams p) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int t = static_cast<int>(blockIdx.x % p.length);
  const int64_t b = blockIdx.x / p.length;
  const int32_t* positions = p.positions + b * p.length;
  const int position = positions[t];
  if (position < 0 || position / p.page_size >= p.table_length) return;
  const int page = p.page_table[b * p.table_length + position / p.page_size], slot = position % p.page_size;
  if (page < 0 || page >= p.pages || written_later(positions, t, p.length)) return;

  const auto words = static_cast<int>(p.row_bytes / sizeof(Word));
  const auto copy = [&](const void* from, const HeadsLayout& row, void* to, const PagesLayout& cache, int i) {
    const int head = i / words, word = i % words;
    const char* source = static_cast<const char*>(from) + b * row.batch_stride + head * row.head_stride +
                         t * row.position_stride;
    char* target = static_cast<char*>(to) + page * cache.page_stride + slot * cache.slot_stride +
                   head * cache.head_stride;
    reinterpret_cast<Word*>(target)[word] = reinterpret_cast<const Word*>(source)[word];
  };
  for (int i = threadIdx.x; i < p.kv_heads * words; i += kWriteThreads) {
    copy(p.k, p.k_layout, p.cache_k, p.cache_k_layout, i);
    copy(p.v, p.v_layout, p.cache_v, p.cache_v_layout, i);
  }
}

}  // namespace dllm::cuda
