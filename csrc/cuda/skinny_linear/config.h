// How skinny_linear cuts a product; host and device read the same numbers.
//
// The outputs are cut in tiles, the inputs of a tile in splits of whole steps, whose sums are added in their
// order. Both depend on the shape of the weight alone: a row's result does not depend on how many rows there
// are, nor on the GPU.
#pragma once

#include <stdint.h>

#include "core/host_device.h"

namespace dllm::cuda {

struct LinearSplits {
  static constexpr int kOutputs = 128;    // of a tile
  static constexpr int kStepBytes = 128;  // of a row of the weight
  static constexpr int kBusyCtas = 96;    // that keep the memory of the largest GPUs busy
  static constexpr int kMinSteps = 4;     // of a split, to outweigh its sums' way through memory
  static constexpr int kMaxSplits = 16;

  int32_t tiles, steps, splits;

  constexpr DLLM_HOST_DEVICE int64_t items() const { return static_cast<int64_t>(tiles) * splits; }
  // First step of a split; `splits` has that after the last.
  constexpr DLLM_HOST_DEVICE int32_t begin(int split) const {
    return static_cast<int32_t>(static_cast<int64_t>(steps) * split / splits);
  }
};

// Of a weight [outputs, inputs] whose elements have so many bytes; neither is 0.
constexpr LinearSplits linear_splits(int32_t outputs, int32_t inputs, int element_bytes) {
  const int step = LinearSplits::kStepBytes / element_bytes;
  const int32_t tiles = (outputs - 1) / LinearSplits::kOutputs + 1, steps = (inputs - 1) / step + 1;
  int splits = (LinearSplits::kBusyCtas - 1) / tiles + 1;
  if (splits > LinearSplits::kMaxSplits) splits = LinearSplits::kMaxSplits;
  if (splits > steps / LinearSplits::kMinSteps) splits = steps / LinearSplits::kMinSteps;
  return {tiles, steps, splits < 1 ? 1 : splits};
}
static_assert(linear_splits(3 * 4096, 4096, 2).splits == 1 && linear_splits(4096, 12'288, 2).splits == 3 &&
              linear_splits(1024, 4096, 2).splits == 12 && linear_splits(1024, 4096, 1).splits == 8);
static_assert(linear_splits(128, 100, 2).splits == 1 && linear_splits(1, 1 << 20, 1).splits == 16);

}  // namespace dllm::cuda
