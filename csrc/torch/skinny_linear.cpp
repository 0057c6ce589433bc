// skinny_linear and its packed weights: their schemas, and the CPU kernels behind them.
#include "cpu/skinny_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "torch/parallel.h"
#include "torch/storage_type.h"

namespace dllm {
namespace {

using cpu::PackedWeightLayout;

constexpr int kPanel = PackedWeightLayout::kPanel;
constexpr int64_t kMostBytes = 1 << 16;  // products of two bytes whose sum fits 32 bits

bool is_bytes(const Tensor& weight) {
  return dtype_of(weight) == ScalarType::Char || dtype_of(weight) == ScalarType::Byte;
}

PackedWeightLayout layout_of(const char* op, const Tensor& weight, int64_t outputs, int64_t inputs) {
  PackedWeightLayout layout{};
  layout.bytes = is_bytes(weight);
  layout.weight_type = dtype_of(weight) == ScalarType::BFloat16 ? DType::bfloat16 : DType::float32;
  check_int(op, "the number of inputs", inputs + kPanel);
  check_int(op, "the number of outputs", outputs + kPanel);
  layout.inputs = static_cast<int32_t>(inputs), layout.outputs = static_cast<int32_t>(outputs);
  return layout;
}

// The shape of a packed weight: [panels, units, kPanel, inputs of a unit].
std::vector<int64_t> packed_shape(const PackedWeightLayout& layout) {
  return {layout.panels(), layout.row_units(), kPanel, layout.unit_inputs()};
}

// ---- pack_weight -----------------------------------------------------------------------------------------
Tensor pack_weight(Tensor weight) {
  constexpr const char* op = "pack_weight";
  check_dims(op, "weight", weight, 2, "[outputs, inputs]");
  check_dtype(op, "weight", weight,
              {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char});
  cpu::PackWeightParams p{};
  static_cast<PackedWeightLayout&>(p) = layout_of(op, weight, weight.size(0), weight.size(1));
  const ScalarType stored = p.bytes                            ? ScalarType::Byte
                            : p.weight_type == DType::bfloat16 ? ScalarType::BFloat16
                                                               : ScalarType::Float;
  Tensor out = torch::stable::new_empty(weight, packed_shape(p), stored);
  const Tensor rows = weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
  p.weight_type = storage_type(weight);
  p.weight = rows.data_ptr(), p.weight_stride = rows.stride(0);
  p.out = out.data_ptr();
  run_items(p.panels(), 2.0 * p.inputs * p.outputs,
            [&](int64_t begin, int64_t end) { cpu::pack_panels(p, begin, end); });
  return out;
}

// ---- packed_linear ---------------------------------------------------------------------------------------
// Groups of the inputs of an int8 weight, whose scales are [groups, panels * kPanel].
int32_t checked_groups(const char* op, const cpu::SkinnyProductParams& layout, const Tensor& weight,
                       const std::optional<Tensor>& scales) {
  check(layout.bytes == scales.has_value(), op,
        layout.bytes ? ": an int8 weight needs scales" : ": scales go with an int8 weight");
  if (!layout.bytes) return 1;
  check_dims(op, "scales", *scales, 2, "[groups, padded outputs]");
  check_dtype(op, "scales", *scales, {ScalarType::Float});
  check_same_device(op, "scales", *scales, "weight", weight);
  check_size(op, "scales", *scales, 1, layout.weight_panels() * kPanel, "the outputs of the panels");
  const int64_t groups = scales->size(0), inputs = layout.inputs;
  check(groups > 0 && inputs % groups == 0 && (groups == 1 || inputs / groups % layout.unit_inputs() == 0),
        op, ": scales must be of groups of the ", inputs, " inputs that are equal and multiples of ",
        layout.unit_inputs(), ", or of one group; got ", groups, " groups");
  check(inputs / groups <= kMostBytes, op, ": a scale of an int8 weight may cover at most ", kMostBytes,
        " inputs, got ", inputs / groups);
  return static_cast<int32_t>(groups);
}

void check_x(const char* op, const Tensor& x) {
  check_float(op, "x", x);
  check(x.dim() >= 1, op, ": x must be [..., inputs], got shape ", shape_text(x));
}

void check_inputs(const char* op, const Tensor& x, int64_t inputs) {
  check(x.size(-1) == inputs, op, ": weight.shape[1] must be ", x.size(-1), " (the inputs of x), got ",
        inputs);
}

void check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t outputs) {
  if (!bias) return;
  check_dims(op, "bias", *bias, 1, "[outputs]");
  check_float(op, "bias", *bias);
  check_same_device(op, "bias", *bias, "x", x);
  check_size(op, "bias", *bias, 0, outputs, "the outputs of weight");
}

Tensor multiply(const char* op, const Tensor& x, const Tensor& weight, const PackedWeightLayout& layout,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& scales, bool gated = false) {
  cpu::SkinnyProductParams p{};
  static_cast<PackedWeightLayout&>(p) = layout;
  p.gated = gated;
  p.groups = checked_groups(op, p, weight, scales);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = p.outputs;
  Tensor out = torch::stable::new_empty(x, shape);
  p.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) p.rows *= x.size(i);
  if (p.rows == 0 || p.outputs == 0) return out;

  const Tensor dense_x = torch::stable::contiguous(x);
  p.x = dense_x.data_ptr(), p.x_type = storage_type(x);
  p.weight = weight.data_ptr();
  p.out = out.data_ptr();
  Tensor dense_bias, dense_scales, read, sums, x_scales;
  if (bias) {
    dense_bias = torch::stable::contiguous(*bias);
    p.bias = dense_bias.data_ptr(), p.bias_type = storage_type(dense_bias);
  }
  if (scales) {
    dense_scales = torch::stable::contiguous(*scales);
    p.scales = static_cast<const float*>(dense_scales.data_ptr());
    x_scales = torch::stable::new_empty(x, {p.rows}, ScalarType::Float);
    p.x_scales = static_cast<float*>(x_scales.data_ptr());
    sums = torch::stable::new_empty(x, {p.rows, p.groups}, ScalarType::Int);
    p.x_sums = static_cast<int32_t*>(sums.data_ptr());
    p.dot_bytes = cpu::has_vnni();
  }
  p.read = dense_x.data_ptr(), p.read_stride = p.inputs;
  if (scales || p.x_type != DType::float32) {
    p.read_stride = p.padded_inputs();
    read =
        torch::stable::new_empty(x, {p.rows, p.read_stride}, scales ? ScalarType::Char : ScalarType::Float);
    p.read = read.data_ptr();
    run_items(p.rows, 4.0 * p.rows * p.inputs,
              [&](int64_t begin, int64_t end) { cpu::pack_rows(p, begin, end); });
  }
  run_adjacent_items(p.items(), 2.0 * p.rows * p.inputs * kPanel * p.weight_panels(),
                     [&](int64_t begin, int64_t end) { cpu::skinny_product(p, begin, end); });
  return out;
}

Tensor multiply_packed(const char* op, const Tensor& x, const Tensor& weight, int64_t outputs,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& scales, bool gated) {
  check_x(op, x);
  check_dims(op, "weight", weight, 4, "[panels, units, 16, inputs of a unit]");
  check_dtype(op, "weight", weight, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Byte});
  check_same_device(op, "weight", weight, "x", x);
  const PackedWeightLayout layout = layout_of(op, weight, outputs, x.size(-1));
  std::vector<int64_t> shape = packed_shape(layout);
  if (gated) shape[0] *= 2;
  check(std::equal(shape.begin(), shape.end(), weight.sizes().begin()), op, ": weight must be packed from [",
        outputs, ", ", x.size(-1), "], got shape ", shape_text(weight));
  check_bias(op, bias, x, gated ? 2 * outputs : outputs);
  return multiply(op, x, torch::stable::contiguous(weight), layout, bias, scales, gated);
}

Tensor packed_linear(Tensor x, Tensor weight, int64_t outputs, std::optional<Tensor> bias,
                     std::optional<Tensor> scales) {
  return multiply_packed("packed_linear", x, weight, outputs, bias, scales, false);
}

Tensor packed_gated_linear(Tensor x, Tensor weight, int64_t outputs, std::optional<Tensor> bias,
                           std::optional<Tensor> scales) {
  return multiply_packed("packed_gated_linear", x, weight, outputs, bias, scales, true);
}

// ---- skinny_linear ---------------------------------------------------------------------------------------
// scales [outputs, groups] as [groups, padded outputs].
std::optional<Tensor> packed_scales(const char* op, const Tensor& weight, const std::optional<Tensor>& scales,
                                    const PackedWeightLayout& layout) {
  if (!scales) return scales;
  check_dims(op, "scales", *scales, 2, "[outputs, groups]");
  check_dtype(op, "scales", *scales, {ScalarType::Float});
  check_same_device(op, "scales", *scales, "weight", weight);
  check_size(op, "scales", *scales, 0, weight.size(0), "the outputs of weight");
  const int64_t groups = scales->size(1);
  Tensor out = torch::stable::new_empty(*scales, {groups, layout.panels() * kPanel});
  torch::stable::zero_(out);
  if (layout.outputs && groups) {
    Tensor outputs = torch::stable::narrow(out, 1, 0, layout.outputs);
    torch::stable::copy_(outputs, torch::stable::transpose(*scales, 0, 1));
  }
  return out;
}

Tensor skinny_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> scales) {
  constexpr const char* op = "skinny_linear";
  check_x(op, x);
  check_dims(op, "weight", weight, 2, "[outputs, inputs]");
  check_dtype(op, "weight", weight,
              {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char});
  check_same_device(op, "weight", weight, "x", x);
  check_inputs(op, x, weight.size(1));
  check_bias(op, bias, x, weight.size(0));
  const PackedWeightLayout layout = layout_of(op, weight, weight.size(0), weight.size(1));
  check(layout.bytes == scales.has_value(), op,
        layout.bytes ? ": an int8 weight needs scales" : ": scales go with an int8 weight");
  const std::optional<Tensor> as_packed = packed_scales(op, weight, scales, layout);
  return multiply(op, x, pack_weight(weight), layout, bias, as_packed);
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def("skinny_linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scales=None) -> Tensor");
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def(
      "packed_linear(Tensor x, Tensor weight, SymInt outputs, Tensor? bias=None, Tensor? scales=None) "
      "-> Tensor");
  m.def(
      "packed_gated_linear(Tensor x, Tensor weight, SymInt outputs, Tensor? bias=None, Tensor? scales=None) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("skinny_linear", TORCH_BOX(&dllm::skinny_linear));
  m.impl("pack_weight", TORCH_BOX(&dllm::pack_weight));
  m.impl("packed_linear", TORCH_BOX(&dllm::packed_linear));
  m.impl("packed_gated_linear", TORCH_BOX(&dllm::packed_gated_linear));
}
