// Cross entropy of logits rows against target ids, and its gradient.
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace dllm::cpu {

enum class LogitsType { float32, bfloat16, float16, float64 };

// Real: float, or double for float64 logits.
struct CrossEntropyParams {
  // Row r starts at logits + (r / inner) · outer_stride + (r % inner) · inner_stride.
  void* logits;
  LogitsType type;
  int64_t inner, outer_stride, inner_stride;
  int32_t vocabulary;

  const int64_t* targets;     // [rows]
  const void* weights;        // Real [rows]; a row of weight 0 is never read
  const int32_t* suppressed;  // ids that are left out of the softmax
  int suppressed_count;

  void *ce, *logsumexp;  // Real [rows]; 0 where the weight is 0
  void* grad;            // type of logits [rows, vocabulary]
  double grad_loss;      // factor of the gradient, beside the weights

  static constexpr int32_t kChunk = 1024;  // ids that are worked on at a time
  int32_t chunks() const { return (vocabulary + kChunk - 1) / kChunk; }
  void* chunk_max;  // Real [rows, chunks()], workspace of cross_entropy_in_place
};

}  // namespace dllm::cpu

// Work items are rows: ce = −ln softmax(x)[target], gradient = weight · (softmax(x) − onehot(target)).

// Writes `ce` and `logsumexp`.
DLLM_CPU_KERNEL(cross_entropy, CrossEntropyParams)
// Reads `logsumexp`, writes `grad`.
DLLM_CPU_KERNEL(cross_entropy_backward, CrossEntropyParams)
// Writes `ce`, and over the logits, float32 or float64, their gradient.
DLLM_CPU_KERNEL(cross_entropy_in_place, CrossEntropyParams)
