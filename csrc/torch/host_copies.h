// With DLLM_DEBUG=1 the CUDA bindings check what index tensors hold, as the CPU operators do. That waits for
// the device before every launch, and cannot be captured in a graph.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "torch/debugging.h"
#include "torch/index_checks.h"

namespace dllm {

// Copies on the host of contiguous tensors, to read in their place; they live as long as this.
class HostCopies {
 public:
  template <class T = int32_t>
  const T* of(const Tensor& tensor) {
    copies_.push_back(torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
    return static_cast<const T*>(copies_.back().data_ptr());
  }
  const int32_t* of(const std::optional<Tensor>& tensor) { return tensor ? of(*tensor) : nullptr; }

 private:
  std::vector<Tensor> copies_;
};

}  // namespace dllm
