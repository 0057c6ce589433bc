// Launches of the cross entropy kernels: rows of logits against target ids. Rows of weight 0 are not read.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/logits.h"

namespace dllm::cuda {

// Real: float, or double for float64 logits.
struct CrossEntropyParams {
  LogitsView logits;
  int64_t rows;
  int32_t vocabulary;
  TokenIds suppress;       // left out of the softmax
  const int64_t* targets;  // [rows]; one outside the vocabulary makes its row's ce NaN
  const void* weights;     // Real [rows]

  void *loss, *ce, *logsumexp;  // Real [], [rows], [rows]
  const void* grad_loss;        // Real []
  void* grad;                   // type of logits [rows, vocabulary]
};

// Writes ce, logsumexp and loss.
cudaError_t cross_entropy(const CrossEntropyParams& params, cudaStream_t stream);
// Reads logsumexp and grad_loss, writes grad.
cudaError_t cross_entropy_backward(const CrossEntropyParams& params, cudaStream_t stream);
// Writes ce and loss, and over the logits the gradient of loss.
cudaError_t cross_entropy_in_place(const CrossEntropyParams& params, cudaStream_t stream);

}  // namespace dllm::cuda
