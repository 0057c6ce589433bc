// Arguments of advance_, checked once for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "core/advance.h"
#include "torch/overlap.h"

namespace dllm {

constexpr int64_t kMaxCanvasLength = 1 << 29;  // the sum of any three positions fits 32 bits

inline AdvanceParams advance_params(const char* op, const Tensor& canvas, const Tensor& rows,
                                    int64_t block_size, int64_t queries, int64_t mask_id, int64_t quota_total,
                                    const std::vector<int64_t>& stop_ids) {
  check_dims(op, "canvas", canvas, 2, "[batch, length]");
  check_dtype(op, "canvas", canvas, {ScalarType::Long, ScalarType::Int});
  check(canvas.size(1) <= 1 || canvas.stride(1) == 1, op, ": canvas must be contiguous along its length");
  check(canvas.size(1) <= kMaxCanvasLength, op, ": canvas must have a length of at most ", kMaxCanvasLength,
        ", got ", canvas.size(1));
  check(1 <= block_size, op, ": block_size must be at least 1, got ", block_size);
  check(block_size <= queries && queries <= kMaxCanvasLength, op, ": queries must be from ", block_size,
        " (block_size) to ", kMaxCanvasLength, ", got ", queries);
  check_dtype(op, "rows", rows, {ScalarType::Int});
  check_same_device(op, "rows", rows, "canvas", canvas);
  const int64_t batch = canvas.size(0), numbers = block_row_numbers(block_size, queries);
  check_int(op, "the rows of canvas", batch);
  check(rows.dim() == 1 && rows.is_contiguous() && rows.size(0) == batch * numbers, op,
        ": rows must be contiguous [", batch * numbers, "], ", numbers, " for each of the ", batch,
        " rows of canvas, got shape ", shape_text(rows), rows.is_contiguous() ? "" : ", not contiguous");
  check(stop_ids.size() <= kMaxStopIds, op, ": stop_ids may list at most ", kMaxStopIds, " ids, got ",
        stop_ids.size());
  check_written(op, {{"rows", rows}}, {{"canvas", canvas}});

  AdvanceParams p{};
  p.batch = static_cast<int32_t>(batch);
  p.block_size = static_cast<int32_t>(block_size);
  p.queries = static_cast<int32_t>(queries);
  p.canvas = canvas.data_ptr();
  p.canvas_is_int64 = canvas.scalar_type() == ScalarType::Long;
  p.canvas_stride = canvas.stride(0);
  p.canvas_length = static_cast<int32_t>(canvas.size(1));
  p.mask_id = check_int(op, "mask_id", mask_id);
  p.quota_total = check_int(op, "quota_total", quota_total);
  p.stop_count = static_cast<int32_t>(stop_ids.size());
  std::copy(stop_ids.begin(), stop_ids.end(), p.stop_ids);
  p.point_into(static_cast<int32_t*>(rows.data_ptr()), batch, block_size, queries);
  return p;
}

}  // namespace dllm
