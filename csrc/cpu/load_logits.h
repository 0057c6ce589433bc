// Consecutive logits of a row on their way through L1: widened, without NaN and +inf, padded, ids barred.
#pragma once

#include <cfloat>

#include "cpu/dtype.h"
#include "cpu/token_stats.h"

namespace dllm::cpu::DLLM_ISA {

constexpr int kChunkIds = 1024;
// Chunks are padded with −inf to a multiple of 64, and reduced in 32 lanes on every instruction set.
constexpr int padded(int count) { return (count + 63) / 64 * 64; }
constexpr int kReduced = 32, kParts = kReduced / kLanes;

// NaN becomes −inf, +inf the largest float: sums stay finite, and +inf wins where it should.
DLLM_SIMD Floats tame(Floats x) {
  const Floats number = max(x, broadcast(-kInfinity));
  return number < FLT_MAX ? number : broadcast(FLT_MAX);
}

DLLM_SIMD void scale_chunk(float scale, int count, float* x) {
  if (scale == 1) return;
  for (int i = 0; i < padded(count); i += kLanes) store(x + i, tame(load(x + i) * scale));
}

// Tames and pads `from`, which may be x itself; returns the highest lane.
inline float load_chunk(const float* from, int count, float* x) {
  const int vectors = count / kLanes * kLanes;
  for (int i = vectors; i < count; i++) x[i] = from[i];
  for (int i = count; i < padded(count); i++) x[i] = -kInfinity;
  Floats highest[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  for (int i = 0; i < padded(count); i += 2 * kLanes)
    for (int j = 0; j < 2; j++) {
      const int at = i + j * kLanes;
      const Floats v = tame(load((at < vectors ? from : x) + at));
      store(x + at, v);
      highest[j] = max(v, highest[j]);
    }
  float lane[2 * kLanes], top = -kInfinity;
  store(lane, highest[0]);
  store(lane + kLanes, highest[1]);
  for (const float v : lane) top = v > top ? v : top;
  return top;
}

inline float load_chunk(const LogitsView& logits, int64_t offset, int count, float* x) {
  if (logits.type == DType::float32)
    return load_chunk(static_cast<const float*>(logits.data) + offset, count, x);
  widen_any(logits.data, logits.type, offset, count, x);
  return load_chunk(x, count, x);
}

// The listed ids that lie in [first, first + count).
struct IdsInChunk {
  const int32_t *begin, *end;
  IdsInChunk(const TokenIds& list, int32_t first, int count) : begin(list.ids), end(list.ids + list.count) {
    while (begin < end && *begin < first) begin++;
    while (begin < end && end[-1] - first >= count) end--;
  }
  bool empty() const { return begin == end; }
  void bar(float* x, int32_t first) const {
    for (const int32_t* id = begin; id < end; id++) x[*id - first] = -kInfinity;
  }
};

}  // namespace dllm::cpu::DLLM_ISA
