#include "cpu/advance.h"

#include <algorithm>

namespace dllm::cpu {
namespace {

template <class Id>
std::vector<BlockRow> moved(const AdvanceParams& p) {
  std::vector<BlockRow> rows(p.batch);
  const int64_t* stop_ids = p.stop_ids;
  for (int64_t b = 0; b < p.batch; b++) {
    const Id* canvas = static_cast<const Id*>(p.canvas) + b * p.canvas_stride;
    const auto is_mask = [&](Id id) { return id == p.mask_id; };
    const auto is_stop = [&](Id id) {
      return std::find(stop_ids, stop_ids + p.stop_count, id) != stop_ids + p.stop_count;
    };
    const auto first = [&](int begin, int end, auto is) {
      return begin < end ? static_cast<int>(std::find_if(canvas + begin, canvas + end, is) - canvas) : end;
    };
    const BlockRow last = block_row(p, b);
    const int end = last.block_end(p.block_size);
    const BlockScan scan{first(last.block_start, end, is_mask), first(last.completion(), end, is_stop),
                         first(end, last.stop, is_mask)};
    BlockRow& row = rows[b] = advanced(last, scan, p.block_size);
    if (row.block_step == 0 && !row.finished())
      row.block_masks = static_cast<int>(
          std::count_if(canvas + row.block_start, canvas + row.block_end(p.block_size), is_mask));
  }
  return rows;
}

}  // namespace

std::vector<BlockRow> advanced_rows(const AdvanceParams& p) {
  return p.canvas_is_int64 ? moved<int64_t>(p) : moved<int32_t>(p);
}

void store_rows(const AdvanceParams& p, const std::vector<BlockRow>& rows) {
  for (int64_t b = 0; b < p.batch; b++) {
    const BlockView view = block_view(rows[b], p.block_size, p.queries);
    store_row(p, b, rows[b], view);
    for (int i = 0; i < p.queries; i++) write_view(p, b, rows[b], view, i);
  }
}

}  // namespace dllm::cpu
