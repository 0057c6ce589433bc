// silu_mul and its gradient on CUDA tensors.
#include <tuple>

#include "cuda/silu_mul/launch.h"
#include "torch/cuda_launch.h"
#include "torch/silu_mul_arguments.h"

namespace dllm {
namespace {

SiluMulTensors launched(const char* op, const std::optional<Tensor>& grad, const Tensor& gate,
                        const Tensor& up) {
  const SiluMulTensors tensors(op, grad, gate, up);
  const OnDeviceOf device(gate);
  check_launch(op, cuda::launch_silu_mul(tensors.params, device.stream()));
  return tensors;
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  return launched("silu_mul", std::nullopt, gate, up).out;
}

std::tuple<Tensor, Tensor> silu_mul_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const SiluMulTensors tensors = launched("silu_mul_backward", grad, gate, up);
  return {tensors.grad_gate, tensors.grad_up};
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) {
  m.impl("silu_mul", TORCH_BOX(&dllm::silu_mul));
  m.impl("silu_mul_backward", TORCH_BOX(&dllm::silu_mul_backward));
}
