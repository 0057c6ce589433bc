// What every CUDA binding needs: the device and stream of a launch, what becomes of its status, and the
// registration of an operator's CUDA implementation.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "torch/checks.h"
#include "torch/debugging.h"

#define DLLM_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CUDA, m)

namespace dllm {

// Launches go to the device of a tensor while this exists. The tensor is known to be on a GPU where all
// others are on its device: the arguments are checked before.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(tensor.get_device_index()) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// With DLLM_DEBUG=1 a launch is waited for: what went wrong in the kernel shows here and not at a later call.
inline void check_launch(const char* op, cudaError_t status) {
  if (status == cudaSuccess && debugging()) status = cudaDeviceSynchronize();
  if (status == cudaSuccess) return;
  cudaGetLastError();  // told here, and not once more by what looks at it after a launch, as CUTLASS does
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    throw std::runtime_error(
        std::string(op) +
        ": the CUDA library holds no kernels for this GPU; it must have compute capability "
        "8.0 or newer, and the library must be built for it: on this machine, or with its "
        "architecture in DLLM_CUDA_ARCHS");
  throw std::runtime_error(std::string(op) + ": the launch failed: " + cudaGetErrorString(status));
}

}  // namespace dllm
