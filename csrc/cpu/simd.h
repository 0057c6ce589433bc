// Vectors of float32 as wide as the instruction set that a file is compiled for (GCC vector
// extensions: the same source on every architecture), and the storage types they widen from.
// Everything lives in a namespace per instruction set, so that the linker never mixes them.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__SSE2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define DLLM_SIMD inline __attribute__((always_inline))

namespace dllm::cpu::DLLM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

constexpr float kInfinity = __builtin_inff();

DLLM_SIMD Floats load(const float* from) {
  Floats v;
  memcpy(&v, from, sizeof v);
  return v;
}
DLLM_SIMD void store(float* to, Floats v) { memcpy(to, &v, sizeof v); }
DLLM_SIMD Ints load(const int32_t* from) {
  Ints v;
  memcpy(&v, from, sizeof v);
  return v;
}
DLLM_SIMD void store(int32_t* to, Ints v) { memcpy(to, &v, sizeof v); }

DLLM_SIMD Floats broadcast(float x) { return x - Floats{}; }
DLLM_SIMD Ints broadcast(int32_t x) { return x - Ints{}; }

DLLM_SIMD Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
// b where a is NaN: a NaN never becomes the running maximum. That is what the instruction does, which GCC 12
// does not find by itself.
DLLM_SIMD Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for x <= 127, relative error below 2e-7; exactly 0 below -126.5, 1 at 0; NaN stays NaN.
DLLM_SIMD Floats exp2(Floats x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits, adding 127 makes it a biased exponent;
  // that of -127 is 0.
  constexpr float kExponent = 12582912.0f + 127.0f;
  x = max(Floats{} - 127.0f, x);
  const Floats shifted = x + kExponent;
  const Floats f = x - (shifted - kExponent);
  Floats y = f * 0.00015345810f + 0.00133999309f;
  y = y * f + 0.00961848907f;
  y = y * f + 0.05550328642f;
  y = y * f + 0.24022646248f;
  y = y * f + 0.69314718246f;
  y = y * f + 1.0f;
  Ints exponent;
  memcpy(&exponent, &shifted, sizeof exponent);
  exponent <<= 23;
  Floats power;
  memcpy(&power, &exponent, sizeof power);
  return y * power;
}

// The halves of two vectors, interleaved. Vector: Floats or Ints.
template <class Vector, int... i>
DLLM_SIMD Vector zip(Vector a, Vector b, std::integer_sequence<int, i...>) {
  return __builtin_shuffle(a, b, Ints{i / 2 + i % 2 * kLanes...});
}
template <class Vector, int... i>
DLLM_SIMD Vector zip_rest(Vector a, Vector b, std::integer_sequence<int, i...>) {
  return __builtin_shuffle(a, b, Ints{(kLanes + i) / 2 + i % 2 * kLanes...});
}

// A square of kLanes vectors, in place: each round zips the first half of the vectors with the second.
DLLM_SIMD void transpose(Floats (&square)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Floats zipped[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++) {
      zipped[2 * i] = zip(square[i], square[i + kLanes / 2], lanes);
      zipped[2 * i + 1] = zip_rest(square[i], square[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) square[i] = zipped[i];
  }
}

// to[j][i] = from[i][j] for i < rows, j < columns; rows of both are padded to whole vectors.
inline void transpose(const float* from, long from_row, int rows, int columns, float* to, long to_row) {
  for (int i = 0; i < rows; i += kLanes) {
    for (int j = 0; j < columns; j += kLanes) {
      Floats square[kLanes];
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; n++)
        square[n] = i + n < rows ? load(from + (i + n) * from_row + j) : Floats{};
      transpose(square);
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; n++) {
        if (j + n < columns) store(to + (j + n) * to_row + i, square[n]);
      }
    }
  }
}

// Storage types of 16 bits. Integer arithmetic only: the loops below vectorise on every architecture.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DLLM_SIMD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
DLLM_SIMD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

DLLM_SIMD float widen(float x) { return x; }
DLLM_SIMD float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
DLLM_SIMD float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const float scaled = float_of(magnitude << 13) * 0x1p112f;  // moves the exponent's bias, subnormals too
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return float_of(bits_of(scaled) | special | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

// Round to nearest, ties to even.
DLLM_SIMD void narrow(float x, float& to) { to = x; }
DLLM_SIMD void narrow(float x, BFloat16& to) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
DLLM_SIMD void narrow(float x, Float16& to) {
  const uint32_t sign = bits_of(x) & 0x80000000u;
  const uint32_t magnitude = bits_of(x) ^ sign;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal half's digits in the last bits of the sum, rounded by the addition.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(half | (sign >> 16));
}

template <typename T>
DLLM_SIMD void prefetch_row(const T* row, int count) {
  for (int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

// Rows of `count` numbers, times `factor`.
template <typename T>
DLLM_SIMD void widen_row(const T* __restrict from, float* __restrict to, int count, float factor = 1.0f) {
  for (int i = 0; i < count; i++) to[i] = widen(from[i]) * factor;
}
template <typename T>
DLLM_SIMD void narrow_row(const float* __restrict from, T* __restrict to, int count, float factor = 1.0f) {
  for (int i = 0; i < count; i++) narrow(from[i] * factor, to[i]);
}

}  // namespace dllm::cpu::DLLM_ISA
