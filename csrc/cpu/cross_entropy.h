// Cross entropy of logits rows against target ids, and its gradient.
#pragma once

#include <stdint.h>

#include "core/params.h"
#include "cpu/isa.h"

namespace dllm::cpu {

constexpr int32_t kCrossEntropyChunk = 1024;  // ids that are worked on at a time
inline int32_t cross_entropy_chunks(int32_t vocabulary) {
  return (vocabulary + kCrossEntropyChunk - 1) / kCrossEntropyChunk;
}

}  // namespace dllm::cpu

// Work items are rows: ce = −ln softmax(x)[target], gradient = weight · (softmax(x) − onehot(target)).

// Writes `ce` and `logsumexp`.
DLLM_CPU_KERNEL(cross_entropy, CrossEntropyParams<TokenIds>)
// Reads `logsumexp`, writes `grad`.
DLLM_CPU_KERNEL(cross_entropy_backward, CrossEntropyParams<TokenIds>)
// Writes `ce`, and over the logits, float32 or float64, their gradient.
DLLM_CPU_KERNEL(cross_entropy_in_place, CrossEntropyParams<TokenIds>)
