// Work items of operators that go through rows: some 16k elements each.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dllm::cpu {

inline int64_t rows_per_item(int32_t width) { return 1 + (1 << 14) / std::max(width, 1); }
inline int64_t row_items(int64_t rows, int32_t width) {
  return (rows + rows_per_item(width) - 1) / rows_per_item(width);
}

}  // namespace dllm::cpu
