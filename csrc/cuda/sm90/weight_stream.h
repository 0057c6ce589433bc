// Tiles and shared memory of Hopper kernels that stream a weight past few rows of x; host and device read the
// same numbers.
#pragma once

#include <stdint.h>

#include "core/params.h"
#include "cuda/sm90/limits.h"
#include "cuda/sm90/matrix_descriptor.h"

namespace dllm::cuda::sm90 {

// A tile is two units of outputs, one for each warpgroup that multiplies, times kRows rows of x. A buffer
// holds a panel of each unit, and the same inputs of x: one panel, or two where the weight is in bytes, of
// which two stand for a 16-bit element. One more warp fetches. kOtherBytes of shared memory are for something
// else.
template <int kRows, size_t kOtherBytes, int kPanelsOfX = 1>
struct WeightStreamTiles {
  static constexpr int kConsumers = 2, kConsumerWarps = kConsumers * kWarpgroup / 32;
  static constexpr int kThreads = kConsumers * kWarpgroup + 32;
  static constexpr int kProducer = kConsumers * kWarpgroup;  // the thread that fetches
  static constexpr int kUnit = 64, kOutputs = kConsumers * kUnit;

  static constexpr int kUnitBytes = panel_bytes(kUnit), kXPanelBytes = panel_bytes(kRows);
  static constexpr int kXPanels = kPanelsOfX, kRowsBytes = kXPanels * kXPanelBytes;
  static constexpr int kBufferBytes = kConsumers * kUnitBytes + kRowsBytes;
  static constexpr int kStages = (220 * 1024 - kOtherBytes) / kBufferBytes;
  static constexpr int kRingBytes = kStages * kBufferBytes;
  static constexpr size_t kSharedBytes = kPanelAlignment + kRingBytes + kOtherBytes;
  static_assert(kSharedBytes + 1024 <= kMaxSharedBytes, "barriers come on top");
  static_assert(kBufferBytes % kPanelAlignment == 0 && kStages >= 4);
};

constexpr int kMaxStreamRows = 64;  // of x that one CTA takes

// 8, 16, 32 or 64.
constexpr int stream_rows(int64_t rows) {
  int tile = 8;
  while (tile < rows && tile < kMaxStreamRows) tile *= 2;
  return tile;
}

// Whether TMA can read both: 16-bit values, rows of x and of the weight, weight_stride apart, that begin at
// multiples of 16 bytes.
inline bool can_stream(const void* x, const void* weight, DType type, int32_t inputs, int64_t weight_stride) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return (type == DType::bfloat16 || type == DType::float16) && inputs > 0 && inputs % 8 == 0 &&
         weight_stride >= inputs && weight_stride % 8 == 0 && weight_stride < int64_t{1} << 39 &&
         aligned(x) && aligned(weight);
}

}  // namespace dllm::cuda::sm90
