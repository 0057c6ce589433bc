// Gumbel noise from random words, through one polynomial logarithm that gives the same bits everywhere:
// IEEE multiplications and additions in a fixed order, never contracted to fused ones. Device code gets
// that from ExactFloat; host files that include this are compiled with -ffp-contract=off.
//
// `Lanes` is the arithmetic: OneLane below, or the vectors of csrc/cpu/gumbel_noise.cpp.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace dllm {

// A float whose products and sums nvcc does not fuse.
struct ExactFloat {
  float value;
  DLLM_HOST_DEVICE constexpr ExactFloat(float v) : value(v) {}

#ifdef __CUDA_ARCH__
  friend DLLM_HOST_DEVICE ExactFloat operator*(ExactFloat a, ExactFloat b) {
    return __fmul_rn(a.value, b.value);
  }
  friend DLLM_HOST_DEVICE ExactFloat operator+(ExactFloat a, ExactFloat b) {
    return __fadd_rn(a.value, b.value);
  }
  friend DLLM_HOST_DEVICE ExactFloat operator-(ExactFloat a, ExactFloat b) {
    return __fsub_rn(a.value, b.value);
  }
#else
  friend DLLM_HOST_DEVICE ExactFloat operator*(ExactFloat a, ExactFloat b) { return a.value * b.value; }
  friend DLLM_HOST_DEVICE ExactFloat operator+(ExactFloat a, ExactFloat b) { return a.value + b.value; }
  friend DLLM_HOST_DEVICE ExactFloat operator-(ExactFloat a, ExactFloat b) { return a.value - b.value; }
#endif
};

struct OneLane {
  using Float = ExactFloat;
  using Bits = uint32_t;
  using Signed = int32_t;
  static DLLM_HOST_DEVICE Float select(bool mask, Float yes, Float no) { return mask ? yes : no; }
#ifdef __CUDA_ARCH__
  static DLLM_HOST_DEVICE Float convert(Signed a) { return __int2float_rn(a); }
  static DLLM_HOST_DEVICE Float convert_unsigned(Bits a) { return __uint2float_rn(a); }
  static DLLM_HOST_DEVICE Bits bits(Float a) { return __float_as_uint(a.value); }
  static DLLM_HOST_DEVICE Float from_bits(Bits a) { return __uint_as_float(a); }
#else
  static DLLM_HOST_DEVICE Float convert(Signed a) { return static_cast<float>(a); }
  static DLLM_HOST_DEVICE Float convert_unsigned(Bits a) { return static_cast<float>(a); }
  static DLLM_HOST_DEVICE Bits bits(Float a) { return __builtin_bit_cast(Bits, a.value); }
  static DLLM_HOST_DEVICE Float from_bits(Bits a) { return __builtin_bit_cast(float, a); }
#endif
};

// x = 2^exponent · (1 + fraction) with 1 + fraction in [√½, √2), for positive normal x.
template <class Lanes>
struct SplitFloat {
  typename Lanes::Signed exponent;
  typename Lanes::Float fraction;
};

template <class Lanes>
DLLM_HOST_DEVICE SplitFloat<Lanes> split_float(typename Lanes::Float x) {
  using Bits = typename Lanes::Bits;
  using Signed = typename Lanes::Signed;
  const Bits bits = Lanes::bits(x);
  const Signed exponent = (Signed)(bits - 0x3F3504F3u) >> 23;  // the bits of √½
  return {exponent, Lanes::from_bits(bits - ((Bits)exponent << 23)) - 1.0f};
}

// Natural logarithm to about one unit in the last place, near 1 too (coefficients of Cephes' logf).
template <class Lanes>
DLLM_HOST_DEVICE typename Lanes::Float natural_log(const SplitFloat<Lanes>& x) {
  using Float = typename Lanes::Float;
  const Float f = x.fraction, exponent = Lanes::convert(x.exponent), square = f * f;
  Float y = f * 7.0376836292e-2f + -1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f + -1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f + -1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f + -2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * square + exponent * -2.12194440e-4f - square * 0.5f;
  return f + y + exponent * 0.693359375f;  // the two constants add up to ln 2
}

// w = (word + ½)·2⁻³², in (0, 1).
template <class Lanes>
DLLM_HOST_DEVICE typename Lanes::Float uniform(typename Lanes::Bits word) {
  return (Lanes::convert_unsigned(word) + 0.5f) * 0x1p-32f;
}

// −ln(−ln(1 − w)). Both ends stay finite: 1 − w comes from the word's complement, and where it is
// close to 1 its logarithm is taken from w itself. Range −3.13 … 22.88.
template <class Lanes>
DLLM_HOST_DEVICE typename Lanes::Float gumbel(typename Lanes::Bits word) {
  SplitFloat<Lanes> rest = split_float<Lanes>(uniform<Lanes>(~word));
  rest.fraction = Lanes::select(rest.exponent == 0, uniform<Lanes>(word) * -1.0f, rest.fraction);
  const typename Lanes::Float exponential = natural_log<Lanes>(rest) * -1.0f;
  return natural_log<Lanes>(split_float<Lanes>(exponential)) * -1.0f;
}

}  // namespace dllm
