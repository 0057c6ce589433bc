// Shadow of CUDA's float16: conversions round to nearest, ties to even; arithmetic goes through float.
#pragma once

#include <cuda_runtime.h>

#include "simt/half_pair.h"

struct __half {
  uint16_t bits;

  __half() = default;
  __half(float x) : bits(x != x ? 0x7FFF : std::bit_cast<uint16_t>(static_cast<_Float16>(x))) {}
  operator float() const { return std::bit_cast<_Float16>(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

SIMT_HALF_PAIR(__half, __half2, half, half2)

inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return std::bit_cast<__half>(bits); }
