// What kernels for tensor cores do with a weight in bytes: widen it, and scale the sums of its groups.
#pragma once

#include <cuda_runtime.h>

#include "core/e4m3.h"
#include "core/params.h"
#include "cuda/ptx.cuh"

namespace dllm::cuda {

// The two lower bytes as a pair of T, exactly; int8 by 2²³ + byte + 128 as a float, less 2²³ + 128.
template <class T, bool kE4m3 = false>
__device__ uint32_t widened_bytes(uint32_t bytes) {
  if constexpr (kE4m3)
    return pack<T>(E4m3{static_cast<uint8_t>(bytes)}.value(), E4m3{static_cast<uint8_t>(bytes >> 8)}.value());
  bytes ^= 0x8080u;
  const auto one = [&](int i) {
    return __uint_as_float(0x4B000000u | (bytes >> 8 * i & 0xFFu)) - 8388736.0f;
  };
  return pack<T>(one(0), one(1));
}

// Whether a group of inputs ends with those before `end`, or the inputs, or those of a split, whose last
// steps these are where `last`.
__device__ inline bool ends_group(const SkinnyLinearParams& p, int32_t end, bool last) {
  return last || end >= p.inputs || end % (p.inputs / p.groups) == 0;
}

// sums += of_group, times the scales of 16 outputs from `output` on and of the group of the input before
// `end`. Both are accumulators of a warp, as cuda/ptx.cuh draws them, their rows outputs.
template <int kTiles>
__device__ void add_scaled(float (&sums)[kTiles][4], const float (&of_group)[kTiles][4],
                           const SkinnyLinearParams& p, int32_t output, int32_t end) {
  const int32_t group = (min(end, p.inputs) - 1) / (p.inputs / p.groups);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int32_t mine = min(output + 8 * half + static_cast<int>(threadIdx.x % 32 / 4), p.outputs - 1);
    const float scale = p.scales[static_cast<int64_t>(mine) * p.groups + group];
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) sums[n][i] = fmaf(scale, of_group[n][i], sums[n][i]);
  }
}

}  // namespace dllm::cuda
