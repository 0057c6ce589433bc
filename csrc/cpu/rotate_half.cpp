#include "cpu/rotate_half.h"

#include <type_traits>

#include "cpu/dtype.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

template <class T>
DLLM_SIMD float rounded(float x) {
  T stored;
  narrow(x, stored);
  return widen(stored);
}

// x and to: rows of 2 · half elements.
template <class T>
void rotate(const T* __restrict x, const T* __restrict cos, const T* __restrict sin, T* __restrict to,
            int half) {
  for (int i = 0; i < half; i++) {
    const float a = widen(x[i]), b = widen(x[i + half]);
    const float low = rounded<T>(-b * widen(sin[i])), high = rounded<T>(a * widen(sin[i + half]));
    narrow(rounded<T>(a * widen(cos[i])) + low, to[i]);
    narrow(rounded<T>(b * widen(cos[i + half])) + high, to[i + half]);
  }
}

template <class T>
void rotate_back(const T* __restrict x, const T* __restrict cos, const T* __restrict sin, T* __restrict to,
                 int half) {
  for (int i = 0; i < half; i++) {
    const float a = widen(x[i]), b = widen(x[i + half]);
    narrow(a * widen(cos[i]) + b * widen(sin[i + half]), to[i]);
    narrow(b * widen(cos[i + half]) - a * widen(sin[i]), to[i + half]);
  }
}

int64_t at(const HeadsLayout& layout, int64_t batch, int64_t head, int64_t position) {
  return batch * layout.batch_stride + head * layout.head_stride + position * layout.position_stride;
}

}  // namespace

void rotate_half(const RotateHalfParams& p, long begin, long end) {
  with_storage_type(p.dtype, [&]<class T>(T) {
    for (long item = begin; item < end; item++) {
      const int64_t batch = item / p.length, position = item % p.length;
      const T* cos =
          static_cast<const T*>(p.cos) + batch * p.cos_batch_stride + position * p.cos_position_stride;
      const T* sin =
          static_cast<const T*>(p.sin) + batch * p.sin_batch_stride + position * p.sin_position_stride;
      const auto heads = [&](int count, const void* from, const HeadsLayout& layout, void* to,
                             const HeadsLayout& to_layout) {
        const auto turn = p.transposed ? rotate_back<T> : rotate<T>;
        for (int head = 0; head < count; head++)
          turn(static_cast<const T*>(from) + at(layout, batch, head, position), cos, sin,
               static_cast<T*>(to) + at(to_layout, batch, head, position), p.head_dim / 2);
      };
      heads(p.q_heads, p.query, p.query_layout, p.query_out, p.query_out_layout);
      heads(p.kv_heads, p.key, p.key_layout, p.key_out, p.key_out_layout);
    }
  });
}

}  // namespace dllm::cpu::DLLM_ISA
