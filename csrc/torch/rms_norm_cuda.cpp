// rms_norm, add_rms_norm and their gradient on CUDA tensors.
#include <tuple>

#include "cuda/rms_norm/launch.h"
#include "torch/cuda_launch.h"
#include "torch/rms_norm_arguments.h"

namespace dllm {
namespace {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  constexpr const char* op = "rms_norm";
  const RmsNormTensors tensors(op, x, std::nullopt, weight, eps);
  const OnDeviceOf device(x);
  check_launch(op, cuda::launch_rms_norm(tensors.params, device.stream()));
  return tensors.out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                        double eps) {
  constexpr const char* op = "add_rms_norm";
  const RmsNormTensors tensors(op, x, residual, weight, eps);
  const OnDeviceOf device(x);
  check_launch(op, cuda::launch_rms_norm(tensors.params, device.stream()));
  return {tensors.out, tensors.sum};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             double eps, const std::optional<Tensor>& grad_sum,
                                             bool needs_grad_weight) {
  constexpr const char* op = "rms_norm_backward";
  const RmsNormBackwardTensors tensors(op, grad, x, weight, eps, grad_sum, needs_grad_weight);
  Tensor scales;
  if (needs_grad_weight) scales = torch::stable::new_empty(x, {tensors.params.rows}, ScalarType::Float);
  float* const data = needs_grad_weight ? static_cast<float*>(scales.data_ptr()) : nullptr;
  const OnDeviceOf device(x);
  check_launch(op, cuda::launch_rms_norm_backward(tensors.params, data, device.stream()));
  if (needs_grad_weight)
    check_launch(op, cuda::launch_rms_norm_weight_gradient(tensors.params, data, device.stream()));
  return {tensors.grad_x, tensors.grad_weight};
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) {
  m.impl("rms_norm", TORCH_BOX(&dllm::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&dllm::add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&dllm::rms_norm_backward));
}
