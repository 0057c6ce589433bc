// Tensors [..., width] as rows with two strides.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <utility>
#include <vector>

#include "core/params.h"
#include "torch/storage_type.h"

namespace dllm {

// The rows of a tensor where they lie, if two strides describe them; else those of a contiguous copy.
struct Rows {
  Tensor tensor;
  RowsLayout layout{1, 0, 0};

  explicit Rows(const Tensor& given) : tensor(given) {
    if (!find_layout()) {
      tensor = torch::stable::contiguous(given);
      find_layout();
    }
  }
  const void* data() const { return tensor.data_ptr(); }

 private:
  bool find_layout() {
    const int64_t width = tensor.size(tensor.dim() - 1);
    std::vector<std::pair<int64_t, int64_t>> dims;  // sizes and strides, neighbours that continue merged
    for (int64_t dim = 0; dim + 1 < tensor.dim(); dim++) {
      const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
      if (size == 1) continue;
      if (!dims.empty() && dims.back().second == stride * size)
        dims.back() = {dims.back().first * size, stride};
      else dims.emplace_back(size, stride);
    }
    if (dims.size() > 2 || (width > 1 && tensor.stride(tensor.dim() - 1) != 1)) return tensor.numel() == 0;
    if (dims.empty()) dims.emplace_back(1, width);
    const auto [inner, inner_stride] = dims.back();
    layout = {inner > 0 ? inner : 1, dims.size() == 2 ? dims.front().second : 0, inner_stride};
    return true;
  }
};

inline Tensor new_like(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return torch::stable::new_empty(tensor, sizes);
}

// Rows of a tensor [..., width] of at least one dimension, one of float32, bfloat16 and float16.
inline void check_rows(const char* op, const char* name, const Tensor& tensor, const char* layout) {
  check(tensor.dim() >= 1, op, ": ", name, " must be ", layout, ", got shape ", shape_text(tensor));
  check_float(op, name, tensor);
  check_int(op, (std::string(name) + ".shape[-1]").c_str(), tensor.size(tensor.dim() - 1));
}

inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); dim++) rows *= tensor.size(dim);
  return rows;
}

// Another tensor of the same shape, dtype and device.
inline void check_like(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                       const Tensor& other) {
  bool same = tensor.dim() == other.dim();
  for (int64_t dim = 0; same && dim < tensor.dim(); dim++) same = tensor.size(dim) == other.size(dim);
  check(same, op, ": ", name, " must have the shape of ", other_name, " ", shape_text(other), ", got shape ",
        shape_text(tensor));
  check_same_dtype(op, name, tensor, other_name, other);
  check_same_device(op, name, tensor, other_name, other);
}

}  // namespace dllm
