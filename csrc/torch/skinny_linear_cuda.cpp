// skinny_linear on CUDA tensors.
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cuda/skinny_linear/launch.h"
#include "torch/cuda_launch.h"
#include "torch/logits_arguments.h"

namespace dllm {
namespace {

constexpr const char* op = "skinny_linear";
constexpr int64_t kScaleInputs = 4;  // that several scales of an output share, and multiples of them
constexpr int64_t kTile = 128;       // outputs and inputs are rounded up to it, in 32 bits

// Throws unless x [..., inputs], weight [outputs, inputs] and bias [outputs] fit each other.
void check_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x.dim() >= 1, op, ": x must be [..., inputs], got shape ", shape_text(x));
  check_float(op, "x", x);
  check_dims(op, "weight", weight, 2, "[outputs, inputs]");
  check_dtype(op, "weight", weight,
              {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char,
               ScalarType::Float8_e4m3fn});
  check_same_device(op, "weight", weight, "x", x);
  check_size(op, "weight", weight, 1, x.size(-1), "the inputs of x");
  if (!bias) return;
  check_dims(op, "bias", *bias, 1, "[outputs]");
  check_float(op, "bias", *bias);
  check_same_device(op, "bias", *bias, "x", x);
  check_size(op, "bias", *bias, 0, weight.size(0), "the outputs of weight");
}

bool is_e4m3(const Tensor& weight) { return dtype_of(weight) == ScalarType::Float8_e4m3fn; }

// Groups of the inputs of a weight in bytes, each with its scale; 1 of other weights.
int32_t checked_groups(const Tensor& weight, const std::optional<Tensor>& scales) {
  const bool bytes = dtype_of(weight) == ScalarType::Char || is_e4m3(weight);
  check(!bytes || scales.has_value(), op, is_e4m3(weight) ? ": a " : ": an ", dtype_name(dtype_of(weight)),
        " weight needs scales");
  check(bytes || !scales.has_value(), op, ": scales go with an int8 or float8_e4m3fn weight");
  if (!bytes) return 1;
  check_dims(op, "scales", *scales, 2, "[outputs, groups]");
  check_dtype(op, "scales", *scales, {ScalarType::Float});
  check_same_device(op, "scales", *scales, "weight", weight);
  check_size(op, "scales", *scales, 0, weight.size(0), "the outputs of weight");
  const int64_t groups = scales->size(1), inputs = weight.size(1);
  check(groups > 0 && inputs % groups == 0 && (groups == 1 || inputs / groups % kScaleInputs == 0), op,
        ": scales must be [outputs, groups] with groups of the ", inputs,
        " inputs that are equal and multiples of ", kScaleInputs, ", or one group; got shape ",
        shape_text(*scales));
  check(groups == 1 || !is_e4m3(weight), op, ": scales of a float8_e4m3fn weight must be [outputs, 1], got ",
        shape_text(*scales));
  return static_cast<int32_t>(groups);
}

// Dense, and at a multiple of 16 bytes, so that its place does not decide which kernel runs.
Tensor aligned(const Tensor& x) {
  Tensor dense = torch::stable::contiguous(x);
  if (reinterpret_cast<uintptr_t>(dense.data_ptr()) % 16 == 0) return dense;
  Tensor copy = torch::stable::new_empty(dense, dense.sizes());
  return torch::stable::copy_(copy, dense);
}

Tensor skinny_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> scales) {
  check_linear(x, weight, bias);
  SkinnyLinearParams p{};
  p.groups = checked_groups(weight, scales);
  p.inputs = check_int(op, "the number of inputs", weight.size(1) + kTile) - kTile;
  p.outputs = check_int(op, "the number of outputs", weight.size(0) + kTile) - kTile;
  const OnDeviceOf device(x);
  std::vector<int64_t> shape = leading_shape(x);
  int64_t rows = 1;
  for (const int64_t size : shape) rows *= size;
  p.rows = check_int(op, "the rows of x", rows);
  shape.push_back(p.outputs);
  Tensor out = torch::stable::new_empty(x, shape);
  if (p.rows == 0 || p.outputs == 0) return out;

  const Tensor dense_x = aligned(x);
  const Tensor dense_weight = weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
  p.x = dense_x.data_ptr(), p.x_type = storage_type(x);
  p.weight = dense_weight.data_ptr(), p.weight_type = storage_type(weight), p.e4m3 = is_e4m3(weight);
  p.weight_stride = p.outputs == 1 ? p.inputs : dense_weight.stride(0);
  p.out = out.data_ptr();
  Tensor dense_bias, dense_scales;
  if (bias) {
    dense_bias = torch::stable::contiguous(*bias);
    p.bias = dense_bias.data_ptr(), p.bias_type = storage_type(dense_bias);
  }
  if (scales) {
    dense_scales = torch::stable::contiguous(*scales);
    p.scales = static_cast<const float*>(dense_scales.data_ptr());
  }
  const int64_t bytes = cuda::skinny_linear_workspace(p);
  Tensor workspace;
  if (bytes > 0) workspace = new_tensor(x, {bytes}, ScalarType::Byte);
  check_launch(op,
               cuda::launch_skinny_linear(p, bytes > 0 ? workspace.data_ptr() : nullptr, device.stream()));
  return out;
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) { m.impl("skinny_linear", TORCH_BOX(&dllm::skinny_linear)); }
