// silu_mul and its gradient: schemas, and the CPU kernels behind them.
#include "cpu/silu_mul.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/parallel.h"
#include "torch/silu_mul_arguments.h"

namespace dllm {
namespace {

constexpr double kOperationsPerElement = 4, kOperationsPerGradient = 8;

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  const SiluMulTensors tensors("silu_mul", std::nullopt, gate, up);
  run_items(cpu::row_items(tensors.params.rows, tensors.params.width), kOperationsPerElement * gate.numel(),
            [&](int64_t begin, int64_t end) { cpu::silu_mul(tensors.params, begin, end); });
  return tensors.out;
}

std::tuple<Tensor, Tensor> silu_mul_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const SiluMulTensors tensors("silu_mul_backward", grad, gate, up);
  run_items(cpu::row_items(tensors.params.rows, tensors.params.width), kOperationsPerGradient * gate.numel(),
            [&](int64_t begin, int64_t end) { cpu::silu_mul_backward(tensors.params, begin, end); });
  return {tensors.grad_gate, tensors.grad_up};
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&dllm::silu_mul));
  m.impl("silu_mul_backward", TORCH_BOX(&dllm::silu_mul_backward));
}
