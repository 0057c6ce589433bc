// KL(p ‖ q) of the softmax distributions of two rows of logits.
#pragma once

#include "cpu/token_stats.h"

namespace dllm::cpu {

struct TokenDivergenceParams {
  LogitsView logits, previous;
  int32_t vocabulary;
  double confidence_scale;                // 1 / confidence temperature
  TokenIds suppress, confidence_exclude;  // left out of both
  bool float64;
  void* divergence;  // [rows], float or double
};

}  // namespace dllm::cpu

// Work items: rows.
DLLM_CPU_KERNEL(token_divergence, TokenDivergenceParams)
