// Shadow of CUDA's bfloat16: conversions round to nearest, ties to even; arithmetic goes through float.
#pragma once

#include <cuda_runtime.h>

#include "simt/half_pair.h"

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(round(x)) {}
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

 private:
  static uint16_t round(float x) {
    if (x != x) return 0x7FFF;
    const uint32_t word = std::bit_cast<uint32_t>(x);
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16;
  }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

SIMT_HALF_PAIR(__nv_bfloat16, __nv_bfloat162, bfloat16, bfloat162)

inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return std::bit_cast<__nv_bfloat16>(bits); }
