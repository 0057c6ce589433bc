// Layouts and orders of the Hopper kernels for test_hopper_layouts.py, which calls them through ctypes.
#include "cuda/block_attention/sm90/config.h"
#include "cuda/block_attention/sm90/dispatch.h"
#include "cuda/linear_token_stats/sm90/config.h"
#include "cuda/linear_token_stats/sm90/dispatch.h"
#include "cuda/skinny_linear/config.h"
#include "cuda/skinny_linear/dispatch.h"
#include "cuda/sm90/matrix_descriptor.h"

using namespace dllm;
using namespace dllm::cuda;

extern "C" {

int offset_in_panel(int row, int byte) { return swizzled_offset(row, byte); }

// Addresses of one product's operand: elements [size][kWgmmaDepth] of a matrix in panels of `rows` rows from
// shared address `panels` on, `step` products along the sum.
void operand_addresses(bool mn_major, int panels, int rows, int step, int size, int* addresses) {
  const uint64_t descriptor = mn_major ? mn_major_step(mn_major_descriptor(panels, panel_bytes(rows)), step)
                                       : k_major_step(k_major_descriptor(panels), step, panel_bytes(rows));
  for (int i = 0; i < size; i++)
    for (int k = 0; k < kWgmmaDepth; k++)
      addresses[i * kWgmmaDepth + k] =
          static_cast<int>(element_address(descriptor, mn_major ? Major::mn : Major::k, i, k));
}

int work_items(int tiles, int q_heads, int pairs, int together) {
  return sm90::WorkOrder{tiles, q_heads, pairs, together}.items();
}
void work_item(int tiles, int q_heads, int pairs, int together, int index, int* item) {
  const auto found = sm90::WorkOrder{tiles, q_heads, pairs, together}.item(index);
  item[0] = found.batch;
  item[1] = found.head;
  item[2] = found.tile;
}
int work_index(int round, int cta, int ctas) { return sm90::WorkOrder::index(round, cta, ctas); }

bool hopper_serves(int capability, int dtype, int head_dim, int q_len, int kv_len, long address,
                   long batch_stride) {
  BlockAttentionParams p{};
  p.dtype = static_cast<DType>(dtype);
  p.batch = 2;
  p.q_heads = p.kv_heads = 1;
  p.q_len = q_len;
  p.kv_len = kv_len;
  p.head_dim = head_dim;
  p.q = p.k = p.v = reinterpret_cast<const void*>(address);
  p.q_layout = p.k_layout = p.v_layout = {batch_stride, 0, 128};
  return sm90::serves(p, capability);
}

void vocabulary_ranges(int vocabulary, int* ids, int* count) {
  const VocabularyRanges ranges(vocabulary);
  *ids = ranges.ids;
  *count = ranges.count;
}
int stream_rows(long rows) { return sm90::stream_rows(rows); }

bool linear_serves(int capability, int hidden_type, int weight_type, bool float64, int hidden_size,
                   long weight_stride, long hidden, long weight) {
  Projection p{};
  p.hidden_type = static_cast<DType>(hidden_type);
  p.weight_type = static_cast<DType>(weight_type);
  p.hidden_size = hidden_size;
  p.weight_stride = weight_stride;
  p.hidden = reinterpret_cast<const void*>(hidden);
  p.weight = reinterpret_cast<const void*>(weight);
  return sm90::serves(p, float64, capability);
}

// Tiles, steps and splits, and the first step of each split and of the one beyond.
void splits_of_linear(int outputs, int inputs, int element_bytes, int* sizes, int* begins) {
  const LinearSplits splits = linear_splits(outputs, inputs, element_bytes);
  sizes[0] = splits.tiles, sizes[1] = splits.steps, sizes[2] = splits.splits;
  for (int i = 0; i <= splits.splits; i++) begins[i] = splits.begin(i);
}

int kernel_of_linear(int capability, int x_type, int weight_type, bool bytes, int inputs, int groups,
                     long weight_stride, long x, long weight, bool e4m3, long rows, int outputs,
                     int bias_type, bool has_cutlass) {
  SkinnyLinearParams p{};
  static const float scale = 1;
  p.x_type = static_cast<DType>(x_type);
  p.weight_type = static_cast<DType>(weight_type);
  p.scales = bytes ? &scale : nullptr;
  p.inputs = inputs;
  p.groups = groups;
  p.weight_stride = weight_stride;
  p.x = reinterpret_cast<const void*>(x);
  p.weight = reinterpret_cast<const void*>(weight);
  p.e4m3 = e4m3, p.rows = rows, p.outputs = outputs;
  p.bias = bias_type < 0 ? nullptr : &scale, p.bias_type = static_cast<DType>(bias_type);
  return static_cast<int>(linear_kernel(p, capability, has_cutlass));
}
}
