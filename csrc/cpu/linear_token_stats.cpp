// A skinny product whose rows of hidden are the columns of panels: the weight is read once, as it is
// stored, a few rows at a time; logits live as long as one chunk of ids.
#include "cpu/linear_token_stats.h"

#include "cpu/gemm_tile.h"
#include "cpu/token_chunk.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

using Params = LinearStatsParams;

constexpr int kIds = 512;                   // logits of a row that exist at once
constexpr int kGroup = 2 * kTileRows;       // rows of the weight that are widened together
constexpr int kDepth = 256;                 // … for so much of the hidden size
constexpr int kWeightStride = kDepth + 16;  // keeps them out of each other's cache sets

void widen_any(const void* data, DType type, int64_t offset, int count, float* to) {
  switch (type) {
    case DType::float32: widen_row(static_cast<const float*>(data) + offset, to, count); break;
    case DType::bfloat16: widen_row(static_cast<const BFloat16*>(data) + offset, to, count); break;
    case DType::float16: widen_row(static_cast<const Float16*>(data) + offset, to, count); break;
  }
}

// Rows are packed in panels of kPanel columns, [hidden_size][columns]; the last is one vector wide where
// that is enough. A column's sums don't depend on the width.
struct Panel {
  int64_t first;
  int width, rows;
  Panel(const Params& p, int64_t first) : first(first) {
    const int64_t left = p.row_count - first;
    width = left > kLanes ? kPanel : kLanes;
    rows = static_cast<int>(left < width ? left : width);
  }
  float* data(const Params& p) const { return p.packed + first * p.hidden_size; }
};

// sums[kGroup][width] += weight rows · columns.
template <int kRows, int kVectors>
void multiply(const float* weight, const float* columns, int steps, bool first, float* sums) {
  Floats keep[kVectors];
  for (Floats& factor : keep) factor = broadcast(1.0f);
  for (int m = 0; m < kGroup; m += kRows)
    gemm_tile<kRows, kVectors>(weight + m * kWeightStride, kWeightStride, 1, columns,
                               sums + m * kVectors * kLanes, steps, first ? nullptr : keep);
}

// logits[row][id] of `count` ids from `first` on and the rows of a group.
void product(const Params& p, int64_t first_row, int32_t first, int count, float (*logits)[kIds]) {
  alignas(64) float weight[kGroup * kWeightStride], sums[Params::kRows / kLanes][kGroup * kPanel];
  const int64_t end_row = first_row + Params::kRows < p.row_count ? first_row + Params::kRows : p.row_count;
  for (int id = 0; id < count; id += kGroup) {
    const int ids = count - id < kGroup ? count - id : kGroup;
    for (int depth = 0; depth < p.hidden_size; depth += kDepth) {
      const int steps = p.hidden_size - depth < kDepth ? p.hidden_size - depth : kDepth;
      for (int m = 0; m < kGroup; m++)
        widen_any(p.weight, p.weight_type, (first + id + (m < ids ? m : 0)) * p.weight_stride + depth, steps,
                  weight + m * kWeightStride);
      for (int64_t row = first_row, i = 0; row < end_row; row += kPanel, i++) {
        const Panel panel(p, row);
        const float* columns = panel.data(p) + depth * panel.width;
        if (panel.width == kPanel)
          multiply<kTileRows, kPanelVectors>(weight, columns, steps, depth == 0, sums[i]);
        else multiply<kGroup, 1>(weight, columns, steps, depth == 0, sums[i]);
      }
    }
    float bias[kGroup] = {};
    if (p.bias) widen_any(p.bias, p.bias_type, first + id, ids, bias);
    for (int64_t row = first_row, i = 0; row < end_row; row += kPanel, i++) {
      const Panel panel(p, row);
      for (int column = 0; column < panel.rows; column++)
        for (int m = 0; m < ids; m++)
          logits[row - first_row + column][id + m] = sums[i][m * panel.width + column] + bias[m];
    }
  }
}

template <class Real>
void fill_states(const Params& p, int64_t part, int64_t first_row) {
  const int rows =
      static_cast<int>(p.row_count - first_row < Params::kRows ? p.row_count - first_row : Params::kRows);
  PartState<Real> states[Params::kRows];
  alignas(64) float logits[Params::kRows][kIds];
  const int32_t begin = static_cast<int32_t>(part * Params::kPart);
  const int32_t end = p.vocabulary - begin < Params::kPart ? p.vocabulary : begin + Params::kPart;
  for (int32_t first = begin; first < end; first += kIds) {
    const int count = end - first < kIds ? end - first : kIds;
    product(p, first_row, first, count, logits);
    for (int i = 0; i < rows; i++) {
      const float bound = load_chunk(logits[i], count, logits[i]);
      add_chunk(states[i], p, first_row + i, first, count, bound, logits[i], [](int) {});
    }
  }
  for (int i = 0; i < rows; i++)
    static_cast<PartState<Real>*>(p.states)[(first_row + i) * p.parts + part] = states[i];
}

}  // namespace

void pack_hidden(const Params& p, long begin, long end) {
  const int64_t last = end * Params::kRows < p.row_count ? end * Params::kRows : p.row_count;
  for (int64_t row = begin * Params::kRows; row < last; row += kPanel) {
    const Panel panel(p, row);
    float* to = panel.data(p);
    for (int column = 0; column < panel.width; column++) {
      alignas(64) float values[kDepth];
      for (int depth = 0; depth < p.hidden_size; depth += kDepth) {
        const int steps = p.hidden_size - depth < kDepth ? p.hidden_size - depth : kDepth;
        if (column < panel.rows)
          widen_any(p.hidden, p.hidden_type, (row + column) * p.hidden_size + depth, steps, values);
        else memset(values, 0, sizeof values);
        for (int i = 0; i < steps; i++) to[(depth + i) * panel.width + column] = values[i];
      }
    }
  }
}

void linear_token_states(const Params& p, long begin, long end) {
  for (long item = begin; item < end; item++) {
    const int64_t part = item / p.row_groups(), first_row = item % p.row_groups() * Params::kRows;
    p.float64 ? fill_states<double>(p, part, first_row) : fill_states<float>(p, part, first_row);
  }
}

}  // namespace dllm::cpu::DLLM_ISA
