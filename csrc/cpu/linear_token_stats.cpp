// A skinny product whose rows of hidden are the columns of panels: the weight is read once, as it is
// stored, a few rows at a time, and a row's logits live for one chunk of ids.
#include "cpu/linear_token_stats.h"

#include "cpu/dtype.h"
#include "cpu/gemm_tile.h"
#include "cpu/token_state_update.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

using Params = LinearStatsParams;

constexpr int kIds = 512;                   // logits of a row that exist at once
constexpr int kGroup = 2 * kTileRows;       // rows of the weight that are widened together,
constexpr int kDepth = 128;                 // for so much of the hidden size: both operands stay in L1
constexpr int kWeightStride = kDepth + 16;  // keeps them out of each other's cache sets
constexpr int kMaxPanels = Params::kRows / kPanel;

DLLM_SIMD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Consecutive rows of hidden, packed as [hidden_size][width]. The last panel is one vector wide where that
// is enough; a column's sums don't depend on the width.
struct Panel {
  int64_t first;
  int rows, width;
  float* data;

  Panel(const Params& p, int64_t first)
      : first(first),
        rows(static_cast<int>(least(p.rows - first, kPanel))),
        width(rows > kLanes ? kPanel : kLanes),
        data(p.packed + first * p.hidden_size) {}
};

// Prefetches rows of the weight from (id, depth) on, a cache line a step.
struct FetchRows {
  const char* data;
  int64_t row_bytes;
  int log_lines, lines;  // lines of a row; of all rows

  FetchRows(const Params& p, int64_t id, int64_t depth, int rows) {
    const int bytes = p.weight_type == DType::float32 ? 4 : 2;
    data = static_cast<const char*>(p.weight) + (id * p.weight_stride + depth) * bytes;
    row_bytes = p.weight_stride * bytes;
    log_lines = bytes == 4 ? 3 : 2;
    static_assert(kDepth == 128, "lines of kDepth elements");
    lines = rows << log_lines;
  }
  DLLM_SIMD void operator()(int step) const {
    if (step < lines)
      __builtin_prefetch(data + (step >> log_lines) * row_bytes + (step & ((1 << log_lines) - 1)) * 64);
  }
};

// sums[kGroup][width] of one panel, for `ids` rows of the weight from `id` on.
struct GroupProduct {
  alignas(64) float weight[kGroup * kWeightStride];
  alignas(64) float sums[kMaxPanels][kGroup * kPanel];

  void compute(const Params& p, int64_t id, int ids, int64_t first_row, int64_t end_row) {
    for (int depth = 0; depth < p.hidden_size; depth += kDepth) {
      const int steps = static_cast<int>(least(p.hidden_size - depth, kDepth));
      for (int m = 0; m < kGroup; m++)
        widen_any(p.weight, p.weight_type, (id + (m < ids ? m : 0)) * p.weight_stride + depth, steps,
                  weight + m * kWeightStride);
      const bool last = depth + kDepth >= p.hidden_size;
      const int64_t next_id = last ? id + kGroup : id, next_depth = last ? 0 : depth + kDepth;
      for (int64_t row = first_row; row < end_row; row += kPanel)
        multiply(p, Panel(p, row), depth, steps, sums[(row - first_row) / kPanel], next_id, next_depth,
                 row == first_row);
    }
  }

 private:
  void multiply(const Params& p, const Panel& panel, int depth, int steps, float* to, int64_t next_id,
                int64_t next_depth, bool fetch) {
    const Floats* keep = depth == 0 ? kOverwrite : kAccumulate;
    const Right columns{panel.data + static_cast<int64_t>(depth) * panel.width, panel.width};
    if (panel.width == kLanes) {
      gemm_tile<kGroup, 1>({weight, kWeightStride, 1}, columns, {to, kLanes}, steps, keep,
                           FetchRows(p, next_id, next_depth, fetch ? kGroup : 0));
      return;
    }
    for (int m = 0; m < kGroup; m += kTileRows)
      gemm_tile({weight + m * kWeightStride, kWeightStride, 1}, columns, {to + m * kPanel, kPanel}, steps,
                keep, FetchRows(p, next_id + m, next_depth, fetch ? kTileRows : 0));
  }
};

// logits[row][i] of ids first + i and rows first_row … end_row.
void compute_logits(const Params& p, int64_t first_row, int64_t end_row, int64_t first, int count,
                    float (*logits)[kIds]) {
  GroupProduct product;
  for (int i = 0; i < count; i += kGroup) {
    const int ids = static_cast<int>(least(count - i, kGroup));
    product.compute(p, first + i, ids, first_row, end_row);
    float bias[kGroup] = {};
    if (p.bias) widen_any(p.bias, p.bias_type, first + i, ids, bias);
    for (int64_t row = first_row; row < end_row; row += kPanel) {
      const Panel panel(p, row);
      const float* sums = product.sums[(row - first_row) / kPanel];
      for (int column = 0; column < panel.rows; column++)
        for (int m = 0; m < ids; m++)
          logits[row - first_row + column][i + m] = sums[m * panel.width + column] + bias[m];
    }
  }
}

template <class Real>
void fill_states(const Params& p, int64_t part, int64_t first_row) {
  const int64_t end_row = least(first_row + Params::kRows, p.rows);
  const int64_t begin = part * Params::kPart, end = least(begin + Params::kPart, p.vocabulary);
  PartState<Real> states[Params::kRows];
  alignas(64) float logits[Params::kRows][kIds];
  for (int64_t first = begin; first < end; first += kIds) {
    const int count = static_cast<int>(least(end - first, kIds));
    compute_logits(p, first_row, end_row, first, count, logits);
    for (int64_t row = first_row; row < end_row; row++) {
      float* x = logits[row - first_row];
      const float bound = load_chunk(x, count, x);
      add_chunk(states[row - first_row], p, row, static_cast<int32_t>(first), count, bound, x,
                FetchNothing());
    }
  }
  for (int64_t row = first_row; row < end_row; row++)
    static_cast<PartState<Real>*>(p.states)[row * p.parts + part] = states[row - first_row];
}

void pack(const Params& p, const Panel& panel) {
  alignas(64) float values[kDepth];
  for (int column = 0; column < panel.width; column++)
    for (int depth = 0; depth < p.hidden_size; depth += kDepth) {
      const int steps = static_cast<int>(least(p.hidden_size - depth, kDepth));
      if (column < panel.rows)
        widen_any(p.hidden, p.hidden_type, (panel.first + column) * p.hidden_size + depth, steps, values);
      else memset(values, 0, sizeof values);
      for (int i = 0; i < steps; i++)
        panel.data[static_cast<int64_t>(depth + i) * panel.width + column] = values[i];
    }
}

}  // namespace

void pack_hidden(const Params& p, long begin, long end) {
  for (int64_t row = begin * Params::kRows; row < least(end * Params::kRows, p.rows); row += kPanel)
    pack(p, Panel(p, row));
}

void linear_token_states(const Params& p, long begin, long end) {
  for (long item = begin; item < end; item++) {
    const int64_t part = item / p.row_groups(), first_row = item % p.row_groups() * Params::kRows;
    p.float64 ? fill_states<double>(p, part, first_row) : fill_states<float>(p, part, first_row);
  }
}

}  // namespace dllm::cpu::DLLM_ISA
