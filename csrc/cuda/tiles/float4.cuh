// Four neighbouring values as float32, whatever they are stored in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/ptx.cuh"

namespace dllm::cuda {

__device__ inline float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }

__device__ inline void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
template <class T>
__device__ void store4(T* to, float4 x) {
  *reinterpret_cast<uint2*>(to) = {pack<T>(x.x, x.y), pack<T>(x.z, x.w)};
}

__device__ inline float4 scaled(float4 a, float b) { return {a.x * b, a.y * b, a.z * b, a.w * b}; }
__device__ inline float4 add_scaled(float4 sum, float4 a, float b) {
  return {fmaf(a.x, b, sum.x), fmaf(a.y, b, sum.y), fmaf(a.z, b, sum.z), fmaf(a.w, b, sum.w)};
}
__device__ inline float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

}  // namespace dllm::cuda
