// What index tensors hold, read on the host. CPU operators always check it; CUDA kernels cut to range
// instead, and their bindings check copies with DLLM_DEBUG=1.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "core/advance.h"
#include "core/params.h"
#include "torch/checks.h"

namespace dllm {

// Spans lie in [0, kv_len], sorted and disjoint. Rows of sequence b from lengths[b] on are not looked at.
inline void check_spans(const char* op, const char* name, const SpanTable& spans, int64_t batch, int64_t rows,
                        int64_t kv_len, const int32_t* lengths = nullptr) {
  if (!spans.data) return;
  for (int64_t b = 0; b < (spans.batch_stride ? batch : std::min<int64_t>(batch, 1)); b++) {
    const int64_t live = lengths ? lengths[b] : rows;
    for (int64_t row = 0; row < (spans.row_stride ? live : std::min<int64_t>(live, 1)); row++) {
      const int32_t* span = spans.data + b * spans.batch_stride + row * spans.row_stride;
      int32_t seen = 0;
      for (int32_t r = 0; r < spans.count; r++, span += 2) {
        const bool empty = span[0] == span[1];
        check(0 <= span[0] && span[0] <= span[1] && span[1] <= kv_len, op, ": ", name, "[", b, ", ", row,
              ", ", r, "] must have 0 <= start <= end <= ", kv_len, ", got [", span[0], ", ", span[1], "]");
        check(empty || span[0] >= seen, op, ": ", name, "[", b, ", ", row, ", ", r,
              "] must start at or after the end of the span before it (", seen, "), got [", span[0], ", ",
              span[1], "]");
        if (!empty) seen = span[1];
      }
    }
  }
}

inline void check_page(const char* op, const int32_t* table, int64_t b, int64_t entry, int64_t pages) {
  check(0 <= table[entry] && table[entry] < pages, op, ": page_table[", b, ", ", entry,
        "] must be a page from 0 to ", pages - 1, ", got ", table[entry]);
}

// Every page that a live query's spans touch exists.
inline void check_pages(const char* op, const CachedAttentionParams& p) {
  std::vector<int> change(p.table_length + 1);
  for (int64_t b = 0; b < p.batch; b++) {
    std::fill(change.begin(), change.end(), 0);
    const int64_t live = p.q_lengths ? p.q_lengths[b] : p.q_len;
    for (int64_t row = 0; row < (p.cache_spans.row_stride ? live : std::min<int64_t>(live, 1)); row++) {
      const int32_t* span =
          p.cache_spans.data + b * p.cache_spans.batch_stride + row * p.cache_spans.row_stride;
      for (int32_t r = 0; r < p.cache_spans.count; r++, span += 2) {
        if (span[0] == span[1]) continue;
        change[span[0] / p.page_size]++;
        change[(span[1] - 1) / p.page_size + 1]--;
      }
    }
    int users = 0;
    for (int64_t entry = 0; entry < p.table_length; entry++) {
      users += change[entry];
      if (users) check_page(op, p.page_table + b * p.table_length, b, entry, p.pages);
    }
  }
}

inline void check_contents(const char* op, const CachedAttentionParams& p) {
  for (int64_t b = 0; p.q_lengths && b < p.batch; b++)
    check(0 <= p.q_lengths[b] && p.q_lengths[b] <= p.q_len, op, ": q_lengths[", b, "] must be from 0 to ",
          p.q_len, ", got ", p.q_lengths[b]);
  const int64_t slots = static_cast<int64_t>(p.table_length) * p.page_size;
  check_spans(op, "cache_spans", p.cache_spans, p.batch, p.q_len, slots, p.q_lengths);
  check_spans(op, "fresh_spans", p.fresh_spans, p.batch, p.q_len, p.q_len, p.q_lengths);
  check_pages(op, p);
}

inline void check_contents(const char* op, const KvWriteParams& p) {
  const int64_t slots = static_cast<int64_t>(p.table_length) * p.page_size;
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t t = 0; t < p.length; t++) {
      const int32_t position = p.positions[b * p.length + t];
      check(-1 <= position && position < slots, op, ": positions[", b, ", ", t,
            "] must be -1 (skip) or a position from 0 to ", slots - 1, ", got ", position);
      if (position >= 0)
        check_page(op, p.page_table + b * p.table_length, b, position / p.page_size, p.pages);
    }
  }
}

// A slot of the cache that a call writes, and the entry of positions that says so.
struct WrittenSlot {
  int64_t slot, row, entry;
};

// The slots that a call writes, in their order; pages and positions are checked.
inline std::vector<WrittenSlot> written_slots(const KvWriteParams& p) {
  std::vector<WrittenSlot> written;
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t t = 0; t < p.length; t++) {
      const int32_t position = p.positions[b * p.length + t];
      if (position < 0) continue;
      const int64_t page = p.page_table[b * p.table_length + position / p.page_size];
      written.push_back({page * p.page_size + position % p.page_size, b, t});
    }
  }
  std::sort(written.begin(), written.end(),
            [](const WrittenSlot& one, const WrittenSlot& other) { return one.slot < other.slot; });
  return written;
}

// The first of `written` among `count` slots from `first` on, or null.
inline const WrittenSlot* first_written(const std::vector<WrittenSlot>& written, int64_t first,
                                        int64_t count) {
  const auto found = std::lower_bound(written.begin(), written.end(), first,
                                      [](const WrittenSlot& one, int64_t least) { return one.slot < least; });
  return found != written.end() && found->slot < first + count ? &*found : nullptr;
}

// No live query sees in the cache what the same call writes there, for its own sequence or for another one
// that shares the page. Spans are read within the table: what they and its pages must be is checked
// elsewhere.
inline void check_unseen(const char* op, const KvWriteParams& p, const SpanTable& spans,
                         const int32_t* q_lengths) {
  const std::vector<WrittenSlot> written = written_slots(p);
  const int64_t slots = static_cast<int64_t>(p.table_length) * p.page_size;
  for (int64_t b = 0; !written.empty() && b < p.batch; b++) {
    const int64_t live = q_lengths ? std::clamp(q_lengths[b], 0, p.length) : p.length;
    const int64_t rows = spans.row_stride ? live : live > 0;
    for (int64_t i = 0; i < rows * spans.count; i++) {
      const int64_t row = i / spans.count, r = i % spans.count;
      const int32_t* span = spans.data + b * spans.batch_stride + row * spans.row_stride + r * 2;
      if (row > 0 && std::equal(span, span + 2, span - spans.row_stride)) continue;
      const int64_t end = std::min<int64_t>(span[1], slots);
      for (int64_t begin = std::max(span[0], 0), next; begin < end; begin = next) {
        next = std::min(end, (begin / p.page_size + 1) * p.page_size);
        const int64_t page = p.page_table[b * p.table_length + begin / p.page_size];
        const WrittenSlot* seen =
            first_written(written, page * p.page_size + begin % p.page_size, next - begin);
        if (!seen) continue;
        check(false, op, ": positions[", seen->row, ", ", seen->entry, "] is ",
              p.positions[seen->row * p.length + seen->entry], " in page ", page, ", which cache_spans[", b,
              ", ", row, ", ", r, "] shows; what a call writes must not be seen in the cache by it");
      }
    }
  }
}

inline void check_contents(const char* op, const AdvanceParams& p) {
  p.for_each([&](const char* name, RowFieldKind kind, const int32_t* values) {
    for (int32_t b = 0; kind == RowFieldKind::position && b < p.batch; b++)
      check(0 <= values[b] && values[b] <= p.canvas_length, op, ": ", name, "[", b, "] must be from 0 to ",
            p.canvas_length, " (the length of canvas), got ", values[b]);
    for (int32_t b = 0; kind == RowFieldKind::count && b < p.batch; b++)
      check(values[b] >= 0, op, ": ", name, "[", b, "] must be >= 0, got ", values[b]);
  });
}

// `moved`: where the rows are after the step. What the pages hold ends where a row's next block begins.
inline void check_cached(const char* op, const AdvanceParams& p, const std::vector<BlockRow>& moved) {
  for (int32_t b = 0; b < p.batch; b++)
    check(moved[b].finished() || p.cached[b] <= moved[b].block_start, op, ": cached[", b,
          "] must be from 0 to ", moved[b].block_start, " (where the active block begins), got ",
          p.cached[b]);
}

// Candidates of a commit: inside the canvas or -1, distinct in a row.
inline void check_candidates(const char* op, const int32_t* positions, int64_t batch, int64_t candidates,
                             int64_t length) {
  std::vector<bool> seen(length);
  for (int64_t b = 0; b < batch; b++) {
    seen.assign(length, false);
    for (int64_t c = 0; c < candidates; c++) {
      const int32_t position = positions[b * candidates + c];
      check(position >= -1 && position < length, op, ": positions[", b, ", ", c, "] must lie between -1 and ",
            length - 1, ", got ", position);
      if (position < 0) continue;
      check(!seen[position], op, ": positions[", b, "] lists ", position, " twice");
      seen[position] = true;
    }
  }
}

inline void check_quotas(const char* op, const int32_t* quota, int64_t batch) {
  for (int64_t b = 0; quota && b < batch; b++)
    check(quota[b] >= 0, op, ": quota[", b, "] must be >= 0, got ", quota[b]);
}

// Blocks of `block` positions from start[b] on lie inside the canvas.
inline void check_block_starts(const char* op, const int32_t* start, int64_t batch, int64_t block,
                               int64_t length) {
  for (int64_t b = 0; b < batch; b++)
    check(start[b] >= 0 && start[b] + block <= length, op, ": block_start[", b, "] must lie between 0 and ",
          length - block, ", got ", start[b]);
}

// Targets of rows of weight other than 0 are token ids that are not left out. suppressed: ascending.
template <class Real>
void check_targets(const char* op, const int64_t* target, const Real* weight, int64_t rows,
                   int64_t vocabulary, const std::vector<int32_t>& suppressed) {
  for (int64_t row = 0; row < rows; row++) {
    if (weight[row] == 0) continue;
    check(target[row] >= 0 && target[row] < vocabulary, op, ": targets must lie between 0 and ",
          vocabulary - 1, " where weights is not 0, got ", target[row], " in row ", row);
    check(!std::binary_search(suppressed.begin(), suppressed.end(), target[row]), op,
          ": targets must not be one of suppress_tokens where weights is not 0, got ", target[row],
          " in row ", row);
  }
}

}  // namespace dllm
