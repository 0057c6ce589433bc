#include "cpu/attention_forward.h"

#include "cpu/query_tile.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

template <typename T>
void attend_item(const BlockAttentionParams& p, int64_t item) {
  const TileItem at = tile_item(item, p.q_heads, p.kv_heads, p.q_len);
  QueryTile tile(at.rows, p.head_dim, p.scale);
  for (int i = 0; i < at.rows.count; i++) tile.set_query(i, at.row<const T>(p.q, p.q_layout, i));

  tile.attend({p.spans, at.batch, p.kv_len}, [&](int key, float* k, float* v) {
    widen_row(at.key<T>(p.k, p.k_layout, key), k, p.head_dim);
    widen_row(at.key<T>(p.v, p.v_layout, key), v, p.head_dim);
  });

  for (int i = 0; i < at.rows.count; i++)
    tile.get_output(i, at.row<T>(p.out, p.out_layout, i), p.lse + at.lse_index(i, p.q_heads, p.q_len));
}

}  // namespace

void block_attention_forward(const BlockAttentionParams& p, long begin, long end) {
  for (long item = begin; item < end; item++) {
    switch (p.dtype) {
      case DType::float32: attend_item<float>(p, item); break;
      case DType::bfloat16: attend_item<BFloat16>(p, item); break;
      case DType::float16: attend_item<Float16>(p, item); break;
    }
  }
}

}  // namespace dllm::cpu::DLLM_ISA
