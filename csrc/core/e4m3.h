// e4m3, a float of 8 bits: a sign, four bits of exponent, three of mantissa, no infinities [Micikevicius et
// al. 2022, FP8 formats for deep learning; torch.float8_e4m3fn].
#pragma once

#include <stdint.h>

#include "core/host_device.h"

namespace dllm {

constexpr float kLargestE4m3 = 448;

struct E4m3 {
  static constexpr uint32_t kNan = 0x7F, kLargest = 0x7E;

  uint8_t bits;

  // Of a finite number beyond the largest ones, the largest.
  static DLLM_HOST_DEVICE E4m3 nearest(float x) {
    constexpr float kAligned = 16384;  // its last bit is that of the smallest e4m3, 2^-9
    constexpr uint32_t kSmallestNormal = 121u << 23, kInfinity = 255u << 23;
    const uint32_t all = __builtin_bit_cast(uint32_t, x), sign = all >> 24 & 0x80u;
    uint32_t size = all & 0x7FFFFFFFu;
    if (size >= kInfinity) return {static_cast<uint8_t>(sign | kNan)};
    if (size < kSmallestNormal) {
      const float aligned = __builtin_bit_cast(float, size) + kAligned;
      size = __builtin_bit_cast(uint32_t, aligned) - __builtin_bit_cast(uint32_t, kAligned);
    } else {
      size += 0x7FFFFu + (size >> 20 & 1);  // to nearest, ties to even
      size = (size >> 20) - (120u << 3);
    }
    return {static_cast<uint8_t>(sign | (size < kLargest ? size : kLargest))};
  }

  DLLM_HOST_DEVICE float value() const {
    constexpr float kExponents = 0x1p120f;  // between the exponents of both formats
    const uint32_t sign = (bits & 0x80u) << 24, size = bits & 0x7Fu;
    const float scaled = __builtin_bit_cast(float, sign | size << 20) * kExponents;
    return size == kNan ? __builtin_bit_cast(float, sign | 0x7FC00000u) : scaled;
  }
};

}  // namespace dllm
