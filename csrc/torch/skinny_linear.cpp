// skinny_linear: its schema, and the CPU kernel behind it.
#include "cpu/skinny_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "torch/parallel.h"
#include "torch/storage_type.h"

namespace dllm {
namespace {

constexpr const char* op = "skinny_linear";
constexpr int64_t kMostBytes = 1 << 17;  // products of two bytes whose sum fits 32 bits

// Groups of the inputs of an int8 weight.
int32_t checked_groups(const Tensor& weight, const std::optional<Tensor>& scales) {
  const bool bytes = dtype_of(weight) == ScalarType::Char;
  check(bytes == scales.has_value(), op,
        bytes ? ": an int8 weight needs scales" : ": scales go with an int8 weight");
  if (!bytes) return 1;
  check_dims(op, "scales", *scales, 2, "[outputs, groups]");
  check_dtype(op, "scales", *scales, {ScalarType::Float});
  check_same_device(op, "scales", *scales, "weight", weight);
  check_size(op, "scales", *scales, 0, weight.size(0), "the outputs of weight");
  const int64_t groups = scales->size(1), inputs = weight.size(1);
  check(groups > 0 && inputs % groups == 0 &&
            (groups == 1 || inputs / groups % cpu::SkinnyProductParams::kPadding == 0),
        op, ": scales must be [outputs, groups] with groups of the ", inputs,
        " inputs that are equal and multiples of ", cpu::SkinnyProductParams::kPadding,
        ", or one group; got shape ", shape_text(*scales));
  check(inputs / groups <= kMostBytes, op, ": a scale of an int8 weight may cover at most ", kMostBytes,
        " inputs, got ", inputs / groups);
  return static_cast<int32_t>(groups);
}

void check_arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x.dim() >= 1, op, ": x must be [..., inputs], got shape ", shape_text(x));
  check_float(op, "x", x);
  check_dims(op, "weight", weight, 2, "[outputs, inputs]");
  check_dtype(op, "weight", weight,
              {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char});
  check_same_device(op, "weight", weight, "x", x);
  check_size(op, "weight", weight, 1, x.size(-1), "the inputs of x");
  check_int(op, "the number of inputs", weight.size(1) + cpu::SkinnyProductParams::kPadding);
  check_int(op, "the number of outputs", weight.size(0) + cpu::SkinnyProductParams::kOutputs);
  if (!bias) return;
  check_dims(op, "bias", *bias, 1, "[outputs]");
  check_float(op, "bias", *bias);
  check_same_device(op, "bias", *bias, "x", x);
  check_size(op, "bias", *bias, 0, weight.size(0), "the outputs of weight");
}

Tensor skinny_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> scales) {
  check_arguments(x, weight, bias);
  cpu::SkinnyProductParams p{};
  p.groups = checked_groups(weight, scales);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(0);
  Tensor out = torch::stable::new_empty(x, shape);
  p.inputs = static_cast<int32_t>(weight.size(1)), p.outputs = static_cast<int32_t>(weight.size(0));
  p.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) p.rows *= x.size(i);
  if (p.rows == 0 || p.outputs == 0) return out;

  const Tensor dense_x = torch::stable::contiguous(x);
  const Tensor dense_weight = weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
  p.x = dense_x.data_ptr(), p.x_type = storage_type(x);
  p.weight = dense_weight.data_ptr(), p.weight_type = storage_type(weight);
  p.weight_stride = dense_weight.stride(0);
  p.out = out.data_ptr();
  Tensor dense_bias, dense_scales;
  if (bias) {
    dense_bias = torch::stable::contiguous(*bias);
    p.bias = dense_bias.data_ptr(), p.bias_type = storage_type(dense_bias);
  }
  const int64_t packed_bytes = p.rows * p.padded_inputs() * (scales ? 1 : sizeof(float));
  const Tensor packed = torch::stable::new_empty(x, {packed_bytes}, ScalarType::Byte);
  p.packed = packed.data_ptr();
  Tensor x_scales;
  if (scales) {
    dense_scales = torch::stable::contiguous(*scales);
    p.scales = static_cast<const float*>(dense_scales.data_ptr());
    x_scales = torch::stable::new_empty(x, {p.rows}, ScalarType::Float);
    p.x_scales = static_cast<float*>(x_scales.data_ptr());
    p.dot_bytes = cpu::has_vnni();
  }
  run_items(p.rows, 4.0 * p.rows * p.inputs,
            [&](int64_t begin, int64_t end) { cpu::pack_rows(p, begin, end); });
  run_items(p.items(), 2.0 * p.rows * p.inputs * p.outputs,
            [&](int64_t begin, int64_t end) { cpu::skinny_product(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def("skinny_linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scales=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) { m.impl("skinny_linear", TORCH_BOX(&dllm::skinny_linear)); }
