// What bfloat16 and float16 share but for their names: conversions, packing of pairs, arithmetic.
#pragma once

#define SIMT_HALF_PAIR(T, T2, name, name2)                                                       \
  inline T __float2##name(float x) { return T(x); }                                              \
  inline T __float2##name##_rn(float x) { return T(x); }                                         \
  inline float __##name##2float(T x) { return x; }                                               \
  inline T2 __floats2##name2##_rn(float x, float y) { return {T(x), T(y)}; }                     \
  inline T2 __float22##name2##_rn(float2 x) { return {T(x.x), T(x.y)}; }                         \
  inline T2 __float2##name2##_rn(float x) { return {T(x), T(x)}; }                               \
  inline T2 __##name##2##name2(T x) { return {x, x}; }                                           \
  inline T2 __halves2##name2(T x, T y) { return {x, y}; }                                        \
  inline T2 make_##name2(T x, T y) { return {x, y}; }                                            \
  inline float __low2float(T2 x) { return x.x; }                                                 \
  inline float __high2float(T2 x) { return x.y; }                                                \
  inline T __low2##name(T2 x) { return x.x; }                                                    \
  inline T __high2##name(T2 x) { return x.y; }                                                   \
  inline T __hadd(T a, T b) { return T(float(a) + float(b)); }                                   \
  inline T __hsub(T a, T b) { return T(float(a) - float(b)); }                                   \
  inline T __hmul(T a, T b) { return T(float(a) * float(b)); }                                   \
  inline T __hfma(T a, T b, T c) { return T(fmaf(a, b, c)); }                                    \
  inline T __hmax(T a, T b) { return T(fmaxf(a, b)); }                                           \
  inline T __hmin(T a, T b) { return T(fminf(a, b)); }                                           \
  inline T2 __hadd2(T2 a, T2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }                 \
  inline T2 __hmul2(T2 a, T2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }                 \
  inline T2 __hfma2(T2 a, T2 b, T2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
  inline T2 __hmax2(T2 a, T2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
