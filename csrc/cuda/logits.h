// Rows of logits and lists of token ids as kernel arguments.
#pragma once

#include <cstdint>

namespace dllm::cuda {

enum class LogitType { float32, bfloat16, float16, float64 };

// Row r starts at data + (r / inner) · outer_stride + (r % inner) · inner_stride, in elements.
struct LogitsView {
  void* data;
  LogitType type;
  int64_t inner, outer_stride, inner_stride;
};

// Token ids travel as kernel arguments: no copy to the device, constant in a captured graph.
constexpr int kMaxListedIds = 64;
struct TokenIds {
  int count;
  int32_t ids[kMaxListedIds];  // ascending
};

}  // namespace dllm::cuda
