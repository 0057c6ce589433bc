// rms_norm, add_rms_norm and their gradient: schemas, and the CPU kernels behind them.
#include "cpu/rms_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/parallel.h"
#include "torch/rms_norm_arguments.h"

namespace dllm {
namespace {

constexpr double kOperationsPerElement = 4, kOperationsPerGradient = 8;

void normalize(const RmsNormTensors& tensors) {
  const RmsNormParams& p = tensors.params;
  const double elements = static_cast<double>(p.rows) * p.width;
  run_items(cpu::row_items(p.rows, p.width), kOperationsPerElement * elements,
            [&](int64_t begin, int64_t end) { cpu::rms_norm(p, begin, end); });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const RmsNormTensors tensors("rms_norm", x, std::nullopt, weight, eps);
  normalize(tensors);
  return tensors.out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                        double eps) {
  const RmsNormTensors tensors("add_rms_norm", x, residual, weight, eps);
  normalize(tensors);
  return {tensors.out, tensors.sum};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             double eps, const std::optional<Tensor>& grad_sum,
                                             bool needs_grad_weight) {
  const RmsNormBackwardTensors tensors("rms_norm_backward", grad, x, weight, eps, grad_sum,
                                       needs_grad_weight);
  const RmsNormBackwardParams& p = tensors.params;
  const double elements = static_cast<double>(p.rows) * p.width;
  run_items(tensors.sums(), kOperationsPerGradient * elements,
            [&](int64_t begin, int64_t end) { cpu::rms_norm_backward(p, begin, end); });
  if (needs_grad_weight)
    run_items(cpu::norm_weight_items(p), static_cast<double>(tensors.sums()) * p.width,
              [&](int64_t begin, int64_t end) { cpu::rms_norm_weight_gradient(p, begin, end); });
  return {tensors.grad_x, tensors.grad_weight};
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor normed, Tensor sum)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, Tensor? grad_sum, "
      "bool needs_grad_weight) -> (Tensor grad_x, Tensor grad_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&dllm::rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&dllm::add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&dllm::rms_norm_backward));
}
