// What is known of B rows of block-causal decoding: int32 tensors that lie one after the other in one buffer.
// The list below is their only one; dllm_kernels.BlockRows reads names and shapes from it.
#pragma once

#include <stdint.h>

namespace dllm {

// What a step reads in a field: positions of the canvas, counts, or nothing, where it only writes.
enum class RowFieldKind { position, count, result };

// field(name, kind, shape after [batch]...) for each, in their order in the buffer.
// Asked of a row: where its completion starts and stops, where its canvas ends, steps of a block (0: one for
// each token of its quotas). Where it is: its active block, how many positions are in pages, queries of the
// last forward, masks that the block had at its first step, steps of all blocks and of this one. The next
// step: -1 is no candidate, or, among write_positions, a token that is not final.
// clang-format off
#define DLLM_BLOCK_ROW_FIELDS(field)          \
  field(given, position)                      \
  field(stop, position)                       \
  field(canvas_end, position)                 \
  field(steps, count)                         \
  field(block_start, position)                \
  field(cached, position)                     \
  field(q_lengths, position)                  \
  field(block_masks, count)                   \
  field(step, count)                          \
  field(block_step, count)                    \
  field(quota, result)                        \
  field(candidates, result, block_size)       \
  field(query_positions, result, queries)     \
  field(write_positions, result, queries)     \
  field(cache_spans, result, 1, 1, 2)         \
  field(fresh_spans, result, queries, 1, 2)
// clang-format on

template <class... Sizes>
constexpr int64_t product(Sizes... sizes) {
  return (int64_t{1} * ... * sizes);
}

// The numbers of one row.
inline int64_t block_row_numbers([[maybe_unused]] int64_t block_size, [[maybe_unused]] int64_t queries) {
  int64_t numbers = 0;
#define DLLM_FIELD(name, kind, ...) numbers += product(__VA_ARGS__);
  DLLM_BLOCK_ROW_FIELDS(DLLM_FIELD)
#undef DLLM_FIELD
  return numbers;
}

struct BlockRowFields {
#define DLLM_FIELD(name, kind, ...) int32_t* name;
  DLLM_BLOCK_ROW_FIELDS(DLLM_FIELD)
#undef DLLM_FIELD

  void point_into(int32_t* buffer, int64_t batch, [[maybe_unused]] int64_t block_size,
                  [[maybe_unused]] int64_t queries) {
#define DLLM_FIELD(field, kind, ...) \
  field = buffer;                    \
  buffer += batch * product(__VA_ARGS__);
    DLLM_BLOCK_ROW_FIELDS(DLLM_FIELD)
#undef DLLM_FIELD
  }

  // visit(name, kind, data) for each field.
  template <class Visit>
  void for_each(const Visit& visit) const {
#define DLLM_FIELD(name, kind, ...) visit(#name, RowFieldKind::kind, name);
    DLLM_BLOCK_ROW_FIELDS(DLLM_FIELD)
#undef DLLM_FIELD
  }
};

// A line for each field: its name and its shape after [batch], in sizes and numbers.
constexpr const char kBlockRowLayout[] =
#define DLLM_FIELD(name, kind, ...) #name " " #__VA_ARGS__ "\n"
    DLLM_BLOCK_ROW_FIELDS(DLLM_FIELD);
#undef DLLM_FIELD

}  // namespace dllm
