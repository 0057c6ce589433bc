// Arguments of rms_norm, add_rms_norm and their gradient, checked once for CPU and CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "torch/rows_layout.h"

namespace dllm {

inline void check_norm(const char* op, const Tensor& x, const Tensor& weight, double eps) {
  check_rows(op, "x", x, "[..., width]");
  check_dims(op, "weight", weight, 1, "[width]");
  check_same_dtype(op, "weight", weight, "x", x);
  check_same_device(op, "weight", weight, "x", x);
  check_size(op, "weight", weight, 0, x.size(x.dim() - 1), "the width of x");
  check(std::isfinite(eps) && eps >= 0, op, ": eps must be a finite number, 0 or more, got ", eps);
}

struct RmsNormTensors {
  Rows x;
  std::optional<Rows> residual;
  Tensor weight, out, sum;

  RmsNormTensors(const char* op, const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                 double eps)
      : x((check_norm(op, x, weight, eps), x)) {
    if (residual) {
      check_like(op, "residual", *residual, "x", x);
      this->residual.emplace(*residual);
      sum = new_like(x);
    }
    this->weight = torch::stable::contiguous(weight);
    out = new_like(x);
    params = {};
    params.dtype = storage_type(x), params.rows = rows_of(x);
    params.width = static_cast<int32_t>(weight.size(0)), params.eps = static_cast<float>(eps);
    params.x = this->x.data(), params.x_layout = this->x.layout;
    params.weight = this->weight.data_ptr(), params.out = out.data_ptr();
    if (!residual) return;
    params.residual = this->residual->data(), params.residual_layout = this->residual->layout;
    params.sum = sum.data_ptr();
  }

  RmsNormParams params;
};

// Fixed by the sizes, so that the order in which gradients of weight are added is too.
inline int64_t norm_rows_per_sum(int64_t rows, int32_t width) {
  constexpr int64_t kMostSums = 64, kLeastElements = 1 << 14;
  return std::max({int64_t{1}, (rows + kMostSums - 1) / kMostSums, kLeastElements / std::max(width, 1)});
}

struct RmsNormBackwardTensors {
  Rows grad, x;
  std::optional<Rows> grad_sum;
  Tensor weight, grad_x, grad_weight, weight_sums;

  RmsNormBackwardTensors(const char* op, const Tensor& grad, const Tensor& x, const Tensor& weight,
                         double eps, const std::optional<Tensor>& grad_sum, bool needs_grad_weight)
      : grad((check_norm(op, x, weight, eps), check_like(op, "grad", grad, "x", x), grad)), x(x) {
    if (grad_sum) {
      check_like(op, "grad_sum", *grad_sum, "x", x);
      this->grad_sum.emplace(*grad_sum);
    }
    this->weight = torch::stable::contiguous(weight);
    grad_x = new_like(x);
    const int64_t width = weight.size(0);
    grad_weight = torch::stable::new_empty(weight, {needs_grad_weight ? width : 0});
    params = {};
    params.dtype = storage_type(x), params.rows = rows_of(x);
    params.width = static_cast<int32_t>(width), params.eps = static_cast<float>(eps);
    params.grad = this->grad.data(), params.grad_layout = this->grad.layout;
    params.x = this->x.data(), params.x_layout = this->x.layout;
    if (grad_sum) params.grad_sum = this->grad_sum->data(), params.grad_sum_layout = this->grad_sum->layout;
    params.weight = this->weight.data_ptr();
    params.grad_x = grad_x.data_ptr(), params.grad_weight = grad_weight.data_ptr();
    params.rows_per_sum = norm_rows_per_sum(params.rows, params.width);
    if (!needs_grad_weight) return;
    weight_sums = torch::stable::new_empty(x, {sums(), width}, ScalarType::Float);
    params.weight_sums = static_cast<float*>(weight_sums.data_ptr());
  }

  int64_t sums() const { return (params.rows + params.rows_per_sum - 1) / params.rows_per_sum; }

  RmsNormBackwardParams params;
};

}  // namespace dllm
