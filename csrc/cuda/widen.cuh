// Float values in arithmetic's type, whatever they are stored in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/e4m3.h"
#include "core/params.h"

namespace dllm::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(int8_t x) { return x; }
__device__ inline float widen(E4m3 x) { return x.value(); }

// Value i of float32, bfloat16 or float16 data.
__device__ inline float value_at(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::bfloat16: return widen(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::float16: return widen(static_cast<const __half*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

}  // namespace dllm::cuda
