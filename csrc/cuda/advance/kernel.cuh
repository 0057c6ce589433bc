// advance_ on CUDA: the threads of a CTA search the canvas of one row together, all of them then take the
// same step, and share the lists of the next view out among themselves.
#pragma once

#include <cuda_runtime.h>

#include "cuda/advance/launch.h"

namespace dllm::cuda {

constexpr int kAdvanceThreads = 128;

// The first position of [begin, end) that `is` holds for, else end. All threads call it and get the same.
template <class Is>
__device__ int first_position(int begin, int end, int* found, Is is) {
  if (threadIdx.x == 0) *found = end;
  __syncthreads();
  int position = begin + static_cast<int>(threadIdx.x);
  bool here = false;
  for (int base = begin; base < end; base += kAdvanceThreads, position += kAdvanceThreads) {
    here = position < end && is(position);
    if (__syncthreads_or(here)) break;
  }
  if (here) atomicMin(found, position);
  __syncthreads();
  const int result = *found;
  __syncthreads();  // the next search overwrites it
  return result;
}

template <class Id>
__global__ void __launch_bounds__(kAdvanceThreads) advance_kernel(const __grid_constant__ AdvanceParams p) {
  __shared__ int found;
  const int64_t b = blockIdx.x;
  const Id* canvas = static_cast<const Id*>(p.canvas) + b * p.canvas_stride;
  const auto is_mask = [&](int position) { return canvas[position] == p.mask_id; };
  const auto is_stop = [&](int position) {
    bool stops = false;
    for (int i = 0; i < p.stop_count; i++) stops |= canvas[position] == p.stop_ids[i];
    return stops;
  };

  const BlockRow last = block_row(p, b);
  const int end = last.block_end(p.block_size);
  const BlockScan scan{first_position(last.block_start, end, &found, is_mask),
                       first_position(last.completion(), end, &found, is_stop),
                       first_position(end, last.stop, &found, is_mask)};
  BlockRow row = advanced(last, scan, p.block_size);
  if (row.block_step == 0 && !row.finished()) {
    const int block_end = row.block_end(p.block_size);
    row.block_masks = 0;
    for (int base = row.block_start; base < block_end; base += kAdvanceThreads) {
      const int position = base + static_cast<int>(threadIdx.x);
      row.block_masks += __syncthreads_count(position < block_end && is_mask(position));
    }
  }

  const BlockView view = block_view(row, p.block_size, p.queries);
  for (int i = threadIdx.x; i < p.queries; i += kAdvanceThreads) write_view(p, b, row, view, i);
  if (threadIdx.x == 0) store_row(p, b, row, view);  // everybody has read: searches end with a barrier
}

}  // namespace dllm::cuda
