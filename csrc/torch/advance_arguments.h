// Arguments of advance_, checked once for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "core/advance.h"
#include "torch/overlap.h"

namespace dllm {

constexpr int64_t kMaxCanvasLength = 1 << 29;  // the sum of any three positions fits 32 bits

// int32, contiguous, as many entries as `sizes` say, on the device of canvas.
inline int32_t* row_data(const char* op, const char* name, const Tensor& tensor, const Tensor& canvas,
                         std::initializer_list<int64_t> sizes) {
  check_dtype(op, name, tensor, {ScalarType::Int});
  check_same_device(op, name, tensor, "canvas", canvas);
  std::string wanted;
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous();
  for (int64_t dim = 0; const int64_t size : sizes) {
    wanted += (dim ? ", " : "") + std::to_string(size);
    fits = fits && tensor.size(dim) == size;
    dim++;
  }
  check(fits, op, ": ", name, " must be contiguous [", wanted, "], got shape ", shape_text(tensor),
        tensor.is_contiguous() ? "" : ", not contiguous");
  return static_cast<int32_t*>(tensor.data_ptr());
}

// The tensors of one batch of rows, in the order of the schema.
struct AdvanceTensors {
  Tensor given, stop, canvas_end, steps;
  Tensor block_start, cached, q_lengths, block_masks, step, block_step;
  Tensor quota, candidates, query_positions, write_positions, cache_spans, fresh_spans;
};

inline AdvanceParams advance_params(const char* op, const Tensor& canvas, const AdvanceTensors& rows,
                                    int64_t mask_id, int64_t quota_total,
                                    const std::vector<int64_t>& stop_ids) {
  check_dims(op, "canvas", canvas, 2, "[batch, length]");
  check_dtype(op, "canvas", canvas, {ScalarType::Long, ScalarType::Int});
  check(canvas.size(1) <= 1 || canvas.stride(1) == 1, op, ": canvas must be contiguous along its length");
  check(canvas.size(1) <= kMaxCanvasLength, op, ": canvas must have a length of at most ", kMaxCanvasLength,
        ", got ", canvas.size(1));
  check_dims(op, "candidates", rows.candidates, 2, "[batch, block_size]");
  check_dims(op, "query_positions", rows.query_positions, 2, "[batch, queries]");
  const int64_t batch = canvas.size(0), block = rows.candidates.size(1);
  const int64_t queries = rows.query_positions.size(1);
  check(block >= 1, op, ": candidates must have a block_size of at least 1, got shape ",
        shape_text(rows.candidates));
  check(block <= queries && queries <= kMaxCanvasLength, op, ": query_positions must have from ", block,
        " (block_size) to ", kMaxCanvasLength, " queries, got ", queries);
  check(stop_ids.size() <= kMaxStopIds, op, ": stop_ids may list at most ", kMaxStopIds, " ids, got ",
        stop_ids.size());

  AdvanceParams p{};
  p.batch = check_int(op, "the rows of canvas", batch);
  p.block_size = static_cast<int32_t>(block);
  p.queries = static_cast<int32_t>(queries);
  p.canvas = canvas.data_ptr();
  p.canvas_is_int64 = canvas.scalar_type() == ScalarType::Long;
  p.canvas_stride = canvas.stride(0);
  p.canvas_length = static_cast<int32_t>(canvas.size(1));
  p.mask_id = check_int(op, "mask_id", mask_id);
  p.quota_total = check_int(op, "quota_total", quota_total);
  p.stop_count = static_cast<int32_t>(stop_ids.size());
  std::copy(stop_ids.begin(), stop_ids.end(), p.stop_ids);
  const auto of_row = [&](const char* name, const Tensor& tensor) {
    return row_data(op, name, tensor, canvas, {batch});
  };
  p.given = of_row("given", rows.given);
  p.stop = of_row("stop", rows.stop);
  p.canvas_end = of_row("canvas_end", rows.canvas_end);
  p.steps = of_row("steps", rows.steps);
  p.block_start = of_row("block_start", rows.block_start);
  p.cached = of_row("cached", rows.cached);
  p.q_lengths = of_row("q_lengths", rows.q_lengths);
  p.block_masks = of_row("block_masks", rows.block_masks);
  p.step = of_row("step", rows.step);
  p.block_step = of_row("block_step", rows.block_step);
  p.quota = of_row("quota", rows.quota);
  p.candidates = row_data(op, "candidates", rows.candidates, canvas, {batch, block});
  p.query_positions = row_data(op, "query_positions", rows.query_positions, canvas, {batch, queries});
  p.write_positions = row_data(op, "write_positions", rows.write_positions, canvas, {batch, queries});
  p.cache_spans = row_data(op, "cache_spans", rows.cache_spans, canvas, {batch, 1, 1, 2});
  p.fresh_spans = row_data(op, "fresh_spans", rows.fresh_spans, canvas, {batch, queries, 1, 2});
  check_written(op,
                {{"block_start", rows.block_start},
                 {"cached", rows.cached},
                 {"q_lengths", rows.q_lengths},
                 {"block_masks", rows.block_masks},
                 {"step", rows.step},
                 {"block_step", rows.block_step},
                 {"quota", rows.quota},
                 {"candidates", rows.candidates},
                 {"query_positions", rows.query_positions},
                 {"write_positions", rows.write_positions},
                 {"cache_spans", rows.cache_spans},
                 {"fresh_spans", rows.fresh_spans}},
                {{"canvas", canvas},
                 {"given", rows.given},
                 {"stop", rows.stop},
                 {"canvas_end", rows.canvas_end},
                 {"steps", rows.steps}});
  return p;
}

}  // namespace dllm
