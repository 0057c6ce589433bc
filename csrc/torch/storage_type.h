// The dtype of a float tensor as parameter blocks name it.
#pragma once

#include "core/params.h"
#include "torch/checks.h"

namespace dllm {

inline DType storage_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double: return DType::float64;
    default: return DType::float32;
  }
}

}  // namespace dllm
