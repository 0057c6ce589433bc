// Arguments of silu_mul and its gradient, checked once for CPU and CUDA.
#pragma once

#include <optional>

#include "torch/rows_layout.h"

namespace dllm {

struct SiluMulTensors {
  Rows gate, up;
  std::optional<Rows> grad;
  Tensor out, grad_gate, grad_up;  // out, or where there is a gradient the two others

  SiluMulTensors(const char* op, const std::optional<Tensor>& grad, const Tensor& gate, const Tensor& up)
      : gate((check_rows(op, "gate", gate, "[..., width]"), check_like(op, "up", up, "gate", gate), gate)),
        up(up) {
    params = {};
    params.dtype = storage_type(gate), params.rows = rows_of(gate);
    params.width = static_cast<int32_t>(gate.size(gate.dim() - 1));
    params.gate = this->gate.data(), params.gate_layout = this->gate.layout;
    params.up = this->up.data(), params.up_layout = this->up.layout;
    if (!grad) {
      out = new_like(gate);
      params.out = out.data_ptr();
      return;
    }
    check_like(op, "grad", *grad, "gate", gate);
    this->grad.emplace(*grad);
    params.grad = this->grad->data(), params.grad_layout = this->grad->layout;
    grad_gate = new_like(gate), grad_up = new_like(gate);
    params.grad_gate = grad_gate.data_ptr(), params.grad_up = grad_up.data_ptr();
  }

  SiluMulParams params;
};

}  // namespace dllm
