// Argument checks of the operators. A failed check throws std::invalid_argument, which Python sees as
// ValueError, through torch.ops and the public functions alike. Texts name the argument, what it was
// and what is allowed: "block_attention: k must have the dtype of q (float32), got bfloat16".
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Char: return "int8";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// torch's stable ABI throws for dtypes that it does not know; no operator takes them.
inline ScalarType dtype_of(const Tensor& tensor) {
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {
    return ScalarType::Undefined;
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline std::string strides_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.stride(i));
  return text + "]";
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string kind = tensor.is_cuda() ? "cuda" : "device";
  return kind + ":" + std::to_string(tensor.get_device_index());
}

// `layout` spells the expected shape, e.g. "[batch, heads, rows, dim]".
inline void check_dims(const char* op, const char* name, const Tensor& tensor, int64_t dims,
                       const char* layout) {
  check(tensor.dim() == dims, op, ": ", name, " must be ", layout, ", got shape ", shape_text(tensor));
}

inline void check_size(const char* op, const char* name, const Tensor& tensor, int64_t dim, int64_t size,
                       const char* why) {
  check(tensor.size(dim) == size, op, ": ", name, ".shape[", dim, "] must be ", size, " (", why,
        "), got shape ", shape_text(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<ScalarType> allowed) {
  std::string names;
  for (const ScalarType type : allowed) {
    if (dtype_of(tensor) == type) return;
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(type));
  }
  check(false, op, ": ", name, " must be ", names, ", got ", dtype_name(dtype_of(tensor)));
}

inline void check_float(const char* op, const char* name, const Tensor& tensor) {
  check_dtype(op, name, tensor, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                             const Tensor& other) {
  check(dtype_of(tensor) == dtype_of(other), op, ": ", name, " must have the dtype of ", other_name, " (",
        dtype_name(dtype_of(other)), "), got ", dtype_name(dtype_of(tensor)));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                              const Tensor& other) {
  check(tensor.is_cpu() == other.is_cpu() && tensor.is_cuda() == other.is_cuda() &&
            tensor.get_device_index() == other.get_device_index(),
        op, ": ", name, " must be on the device of ", other_name, " (", device_text(other), "), got ",
        device_text(tensor));
}

// For sizes that kernels hold in 32 bits.
inline int check_int(const char* op, const char* name, int64_t value) {
  check(value >= 0 && value <= std::numeric_limits<int>::max(), op, ": ", name, " must be between 0 and ",
        std::numeric_limits<int>::max(), ", got ", value);
  return static_cast<int>(value);
}

}  // namespace dllm
