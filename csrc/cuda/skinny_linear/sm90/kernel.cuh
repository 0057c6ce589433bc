// skinny_linear for Hopper. A CTA walks through a range of the items, tiles of outputs in splits of their
// inputs; the weight of the next item is on its way while the sums of this one are stored. Bytes of a weight
// are widened on their way from shared memory to registers, which the product takes as well; while one
// warpgroup widens the other one multiplies.
#pragma once

#include "cuda/launch_kernel.h"
#include "cuda/skinny_linear/byte_weight.cuh"
#include "cuda/skinny_linear/epilogue.cuh"
#include "cuda/skinny_linear/sm90/launch.h"
#include "cuda/sm90/weight_stream.cuh"

namespace dllm::cuda::sm90 {

template <class T, int kRows, bool kBytes>
struct StreamedLinear {
  using Tiles = StreamedLinearTiles<kRows, kBytes>;
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

  // Inputs [64·half, 64·half + 64) of a panel of bytes as the left operand of four products, by the layout
  // that cuda/sm90/ptx.cuh draws.
  __device__ static void load_bytes(uint32_t (&a)[4][4], const unsigned char* panel, int half) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int byte = 64 * half + 16 * k + lane % 4 * 2 + i / 2 * 8;
        a[k][i] = widened_bytes<T>(
            *reinterpret_cast<const uint16_t*>(panel + swizzled_offset(row + i % 2 * 8, byte)));
      }
  }
  // As WeightStream::multiply_tile, of bytes: this warp's first output is `output`.
  __device__ void multiply_bytes(float (&sums)[kRows / 8][4], int unit, const StreamedTile& here,
                                 int32_t output, Ring& ring) const {
#pragma unroll
    for (int n = 0; n < kRows / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[n][i] = 0;
    float of_group[kRows / 8][4];
    bool begun = false;  // the group, by products of this split
    for (int32_t step = here.first_step; step < here.first_step + here.steps; step++) {
      stream.shared.buffers[ring.stage].wait_full(ring.parity);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int32_t end_of_half = (2 * step + half + 1) * kPanelColumns;
        if (end_of_half - kPanelColumns >= p.linear.inputs) break;
        uint32_t a[4][4];
        load_bytes(a, stream.weight(ring.stage, unit), half);
        const uint64_t b =
            k_major_descriptor(shared_address(stream.x(ring.stage) + half * Tiles::kXPanelBytes));
        wgmma_fence(of_group, a);
#pragma unroll
        for (int k = 0; k < 4; k++)
          wgmma_mma_async<T, Major::k>(of_group, a[k], k_major_step(b, k, Tiles::kXPanelBytes),
                                       begun || k > 0);
        wgmma_commit_group();
        wgmma_wait_group<0>(of_group);
        const bool last = half == 1 && step + 1 == here.first_step + here.steps;
        begun = !ends_group(p.linear, end_of_half, last);
        if (!begun) add_scaled(sums, of_group, p.linear, output, end_of_half);
      }
      stream.shared.buffers[ring.stage].release();
      ring.advance();
    }
  }

  // What lands in the buffers was copied after griddepcontrol_wait(): the consumers' loads and stores come
  // after it too.
  __device__ void multiply(int unit) const {
    Ring ring;
    for (int64_t item = begin; item < end; item++) {
      const StreamedTile here = tile(item);
      const int32_t first = here.first + unit * Tiles::kUnit;
      if (first < here.end) {
        const int32_t output = first + threadIdx.x % kWarpgroup / 32 * 16;
        float sums[kRows / 8][4];
        if constexpr (kBytes) multiply_bytes(sums, unit, here, output, ring);
        else stream.multiply_tile(sums, unit, here.steps, ring);
        store_sums<T>(p, sums, output, split(item),
                      [&](int column) { return static_cast<int64_t>(stream.first_row) + column; });
      } else {
        stream.pass_tile(here.steps, ring);
      }
    }
  }
};

template <class T, int kRows, bool kBytes>
__global__ void __launch_bounds__(StreamedLinearTiles<kRows, kBytes>::kThreads, 1)
    linear_kernel(const __grid_constant__ StreamedLinearParams p) {
  using Tiles = StreamedLinearTiles<kRows, kBytes>;
  using Role = StreamedLinear<T, kRows, kBytes>;
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
template <class T, int kRows, bool kBytes>
cudaError_t launch_linear_kernel(const StreamedLinearParams& p, cudaStream_t stream) {
  using Tiles = StreamedLinearTiles<kRows, kBytes>;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int64_t groups = (p.split.linear.rows - 1) / kRows + 1, items = p.split.splits.items();
  const int64_t most = groups < multiprocessors ? multiprocessors / groups : 1;
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(items < most ? items : most));
  return launch_overlapping(linear_kernel<T, kRows, kBytes>, grid, Tiles::kThreads, Tiles::kSharedBytes,
                            stream, p);
}

}  // namespace dllm::cuda::sm90
