// Logits and lists of ids as CUDA kernels take them.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/logits.h"
#include "torch/logits_arguments.h"

namespace dllm {

inline cuda::LogitType logit_type(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return cuda::LogitType::bfloat16;
    case ScalarType::Half: return cuda::LogitType::float16;
    case ScalarType::Double: return cuda::LogitType::float64;
    default: return cuda::LogitType::float32;
  }
}

inline cuda::LogitsView logits_view(const LogitsRows& rows) {
  return {rows.tensor.data_ptr(), logit_type(rows.tensor.scalar_type()), rows.inner, rows.outer_stride,
          rows.inner_stride};
}

inline cuda::TokenIds listed_ids(const char* op, const char* name, const std::vector<int32_t>& ids) {
  check(ids.size() <= cuda::kMaxListedIds, op, ": ", name, " may list at most ", cuda::kMaxListedIds,
        " ids on CUDA, got ", ids.size());
  cuda::TokenIds list{};
  list.count = static_cast<int>(ids.size());
  std::copy(ids.begin(), ids.end(), list.ids);
  return list;
}

}  // namespace dllm
