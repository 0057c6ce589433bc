// The angles of a position are widened once for all its heads, in chunks that stay in L1.
#include "cpu/rotate_half.h"

#include <algorithm>

#include "cpu/row_chunks.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

int64_t at(const HeadsLayout& layout, int64_t batch, int64_t head, int64_t position) {
  return batch * layout.batch_stride + head * layout.head_stride + position * layout.position_stride;
}

template <class T>
class Rotation {
 public:
  explicit Rotation(const RotateHalfParams& p) : p(p), half(p.head_dim / 2) {}

  void turn(int64_t batch, int64_t position) {
    const T* cos = static_cast<const T*>(p.cos) + batch * p.cos_batch_stride;
    const T* sin = static_cast<const T*>(p.sin) + batch * p.sin_batch_stride;
    cos += position * p.cos_position_stride, sin += position * p.sin_position_stride;
    for (first = 0; first < half; first += kRowChunk) {
      count = std::min(kRowChunk, half - first);
      read_angles(cos, sin);
      for (int head = 0; head < p.q_heads; head++)
        turn_head(static_cast<const T*>(p.query) + at(p.query_layout, batch, head, position),
                  static_cast<T*>(p.query_out) + at(p.query_out_layout, batch, head, position));
      for (int head = 0; head < p.kv_heads; head++)
        turn_head(static_cast<const T*>(p.key) + at(p.key_layout, batch, head, position),
                  static_cast<T*>(p.key_out) + at(p.key_out_layout, batch, head, position));
    }
  }

 private:
  // The gradient is a rotation back: the sines change sign and halves.
  void read_angles(const T* cos, const T* sin) {
    const T *low = sin + first, *high = sin + half + first;
    cos_low = chunk_of(cos + first, count, angles[0]);
    cos_high = chunk_of(cos + half + first, count, angles[1]);
    widen_row(p.transposed ? high : low, sin_low, count, p.transposed ? 1.0f : -1.0f);
    widen_row(p.transposed ? low : high, sin_high, count, p.transposed ? -1.0f : 1.0f);
  }

  void turn_head(const T* x, T* to) {
    const float *low = chunk_of(x + first, count, lows), *high = chunk_of(x + half + first, count, highs);
    float *to_low = low_result.at(to + first, count), *to_high = high_result.at(to + half + first, count);
    if constexpr (std::is_same_v<T, float>) {
      for (int i = 0; i < padded_chunk(count); i += kLanes) {
        const Floats a = load(low + i), b = load(high + i);
        store(to_low + i, a * load(cos_low + i) + b * load(sin_low + i));
        store(to_high + i, b * load(cos_high + i) + a * load(sin_high + i));
      }
    } else {
      for (int i = 0; i < padded_chunk(count); i += kLanes) {
        const Floats a = load(low + i), b = load(high + i);
        store(to_low + i, a * load(cos_low + i));
        store(to_high + i, b * load(cos_high + i));
        store(turned_low + i, b * load(sin_low + i));
        store(turned_high + i, a * load(sin_high + i));
      }
      for (float* product : {to_low, to_high, turned_low, turned_high}) round_chunk<T>(product, count);
      for (int i = 0; i < padded_chunk(count); i += kLanes) {
        store(to_low + i, load(to_low + i) + load(turned_low + i));
        store(to_high + i, load(to_high + i) + load(turned_high + i));
      }
    }
    low_result.put(to_low, to + first, count);
    high_result.put(to_high, to + half + first, count);
  }

  const RotateHalfParams& p;
  const int half;
  int first = 0, count = 0;  // the chunk of each half
  const float *cos_low, *cos_high;
  alignas(64) float angles[2][kRowChunk], sin_low[kRowChunk], sin_high[kRowChunk];
  alignas(64) float lows[kRowChunk], highs[kRowChunk], turned_low[kRowChunk], turned_high[kRowChunk];
  ResultChunk<T> low_result, high_result;
};

}  // namespace

void rotate_half(const RotateHalfParams& p, long begin, long end) {
  with_storage_type(p.dtype, [&]<class T>(T) {
    Rotation<T> rotation(p);
    for (long item = begin; item < end; item++) rotation.turn(item / p.length, item % p.length);
  });
}

}  // namespace dllm::cpu::DLLM_ISA
