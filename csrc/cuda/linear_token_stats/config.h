// How linear_token_stats cuts the vocabulary; host and device read the same numbers.
#pragma once

#include <stdint.h>

#include "core/host_device.h"

namespace dllm::cuda {

// Ranges of whole units, about as many as a large Hopper GPU has multiprocessors: one CTA walks through one.
// They depend on the vocabulary alone and merge in order, so a row's result does not depend on how many rows
// there are.
struct VocabularyRanges {
  static constexpr int kUnit = 64;  // ids
  static constexpr int kMaxRanges = 132;
  int32_t ids, count;  // of a range, of which the last may be shorter; ranges

  explicit constexpr DLLM_HOST_DEVICE VocabularyRanges(int32_t vocabulary) {
    const int32_t units = (vocabulary - 1) / kUnit + 1;
    ids = ((units - 1) / kMaxRanges + 1) * kUnit;
    count = (vocabulary - 1) / ids + 1;
  }
};

}  // namespace dllm::cuda
