// The running state of a softmax over scores in base 2 (scores times log2 e): the largest score so far
// and the sum of 2^(score - max). States of disjoint sets of scores merge exactly.
#pragma once

#include <math.h>

#include "core/host_device.h"

namespace dllm {

struct SoftmaxState {
  float max = -INFINITY;
  float sum = 0.0f;

  // What scores are shifted by: finite even when nothing was seen, so that 2^(-inf - shift) is 0.
  DLLM_HOST_DEVICE float shift() const { return max == -INFINITY ? 0.0f : max; }

  DLLM_HOST_DEVICE void merge(const SoftmaxState& other) {
    const float larger = max > other.max ? max : other.max;
    const float shift = larger == -INFINITY ? 0.0f : larger;
    sum = sum * exp2f(max - shift) + other.sum * exp2f(other.max - shift);
    max = larger;
  }

  // Of the values that weights 2^(score - max) were summed with; 0 when nothing was seen.
  DLLM_HOST_DEVICE float inverse_sum() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }

  // Natural logarithm; -inf when nothing was seen.
  DLLM_HOST_DEVICE float log_sum_exp() const {
    return sum == 0.0f ? -INFINITY : (max + log2f(sum)) * 0.6931471805599453f;
  }
};

}  // namespace dllm
