// Shadow of csrc/torch/cuda_launch.h: the bindings serve CPU tensors as operators of dllm_kernels_simt.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include "torch/checks.h"

#define DLLM_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(dllm_kernels_simt, CPU, m)

namespace dllm {

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

inline void check_launch(const char* op, cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the launch failed: " + cudaGetErrorString(status));
}

}  // namespace dllm
