// skinny_linear for Hopper. A CTA walks through a range of the items, tiles of outputs in splits of their
// inputs; the weight of the next item is on its way while the sums of this one are stored.
#pragma once

#include "cuda/launch_kernel.h"
#include "cuda/skinny_linear/epilogue.cuh"
#include "cuda/skinny_linear/sm90/launch.h"
#include "cuda/sm90/weight_stream.cuh"

namespace dllm::cuda::sm90 {

template <class T, int kRows>
struct StreamedLinear {
  using Tiles = StreamedLinearTiles<kRows>;
  using Stream = WeightStream<T, kRows, Tiles>;
  using Ring = typename Stream::Ring;

  const SplitLinearParams& p;
  Stream stream;
  int64_t begin, end;  // items of this CTA

  __device__ int split(int64_t item) const { return static_cast<int>(item % p.splits.splits); }
  __device__ StreamedTile tile(int64_t item) const {
    const int32_t step = p.splits.begin(split(item));
    return {static_cast<int32_t>(item / p.splits.splits * Tiles::kOutputs), p.linear.outputs, step,
            p.splits.begin(split(item) + 1) - step};
  }

  __device__ void load() const {
    stream.prefetch_tile(tile(begin));
    griddepcontrol_wait();
    Ring ring;
    for (int64_t item = begin; item < end; item++) stream.load_tile(tile(item), ring);
  }

  // What lands in the buffers was copied after griddepcontrol_wait(): the consumers' loads and stores come
  // after it too.
  __device__ void multiply(int unit) const {
    Ring ring;
    for (int64_t item = begin; item < end; item++) {
      const StreamedTile here = tile(item);
      const int32_t first = here.first + unit * Tiles::kUnit;
      if (first < here.end) {
        float sums[kRows / 8][4];
        stream.multiply_tile(sums, unit, here.steps, ring);
        store_sums<T>(p, sums, first + threadIdx.x % kWarpgroup / 32 * 16, split(item),
                      [&](int column) { return static_cast<int64_t>(stream.first_row) + column; });
      } else {
        stream.pass_tile(here.steps, ring);
      }
    }
  }
};

template <class T, int kRows>
__global__ void __launch_bounds__(StreamedLinearTiles<kRows>::kThreads, 1)
    linear_kernel(const __grid_constant__ StreamedLinearParams p) {
  using Tiles = StreamedLinearTiles<kRows>;
  using Role = StreamedLinear<T, kRows>;
  griddepcontrol_launch_dependents();
  __shared__ typename Role::Stream::Shared shared;
  const int64_t items = p.split.splits.items();
  const Role role{p.split,
                  {p.weight, p.x, shared, panel_shared(), static_cast<int32_t>(blockIdx.x * kRows)},
                  items * blockIdx.y / gridDim.y,
                  items * (blockIdx.y + 1) / gridDim.y};
  shared.init();

  if (threadIdx.x < Tiles::kProducer) role.multiply(threadIdx.x / kWarpgroup);
  else if (threadIdx.x == Tiles::kProducer) role.load();
}

// Groups of rows that read the same part of the weight run side by side, on all multiprocessors together.
template <class T, int kRows>
cudaError_t launch_linear_kernel(const StreamedLinearParams& p, cudaStream_t stream) {
  using Tiles = StreamedLinearTiles<kRows>;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int64_t groups = (p.split.linear.rows - 1) / kRows + 1, items = p.split.splits.items();
  const int64_t most = groups < multiprocessors ? multiprocessors / groups : 1;
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(items < most ? items : most));
  return launch_overlapping(linear_kernel<T, kRows>, grid, Tiles::kThreads, Tiles::kSharedBytes, stream, p);
}

}  // namespace dllm::cuda::sm90
