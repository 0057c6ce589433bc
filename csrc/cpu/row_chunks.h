// Chunks of a row on their way through L1, as floats; storage types of 16 bits are widened and rounded here.
#pragma once

#include <type_traits>

#include "cpu/dtype.h"

namespace dllm::cpu::DLLM_ISA {

constexpr int kRowChunk = 512;
// Reductions run in 32 lanes on every instruction set; what is beyond the row is 0.
constexpr int kRowLanes = 32, kRowParts = kRowLanes / kLanes;

constexpr int padded_chunk(int count) { return (count + kRowLanes - 1) / kRowLanes * kRowLanes; }

// `count` elements, at most kRowChunk, padded with zeros to whole lanes: where they lie, or in `buffer`.
template <class T>
DLLM_SIMD const float* chunk_of(const T* from, int count, float* buffer) {
  if constexpr (std::is_same_v<T, float>)
    if (count % kRowLanes == 0) return from;
  widen_row(from, buffer, count);
  for (int i = count; i < padded_chunk(count); i++) buffer[i] = 0;
  return buffer;
}

// Where a chunk of results is computed, and put in its place at last.
template <class T>
struct ResultChunk {
  alignas(64) float buffer[kRowChunk];

  float* at(T* to, int count) {
    if constexpr (std::is_same_v<T, float>)
      if (count % kRowLanes == 0) return to;
    return buffer;
  }
  void put(const float* results, T* to, int count) {
    if constexpr (std::is_same_v<T, float>)
      if (count % kRowLanes == 0) return;
    narrow_row(results, to, count);
  }
};

// Rounds a chunk to the storage type.
template <class T>
DLLM_SIMD void round_chunk(float* chunk, int count) {
  if constexpr (!std::is_same_v<T, float>) {
    for (int i = 0; i < count; i++) {
      T rounded;
      narrow(chunk[i], rounded);
      chunk[i] = widen(rounded);
    }
  }
}

struct LaneSums {
  Floats part[kRowParts] = {};

  double total() const {
    float lane[kRowLanes];
    double sum = 0;
    for (int j = 0; j < kRowParts; j++) store(lane + j * kLanes, part[j]);
    for (const float v : lane) sum += v;
    return sum;
  }
};

}  // namespace dllm::cpu::DLLM_ISA
