// Launch of the token_divergence kernel: KL(p ‖ q) of the softmax distributions of two rows of logits.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/logits.h"

namespace dllm::cuda {

struct TokenDivergenceParams {
  LogitsView logits, previous;
  int64_t rows;
  int32_t vocabulary;
  float confidence_scale;                 // 1 / confidence temperature
  TokenIds suppress, confidence_exclude;  // left out of both
  bool float64;
  void* divergence;  // [rows], float or double
};

cudaError_t token_divergence(const TokenDivergenceParams& params, cudaStream_t stream);

}  // namespace dllm::cuda
