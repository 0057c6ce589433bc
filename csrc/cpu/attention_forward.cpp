#include "cpu/attention_forward.h"

#include "cpu/query_tile.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

template <typename T>
void attend_item(const BlockAttentionParams& p, int64_t item) {
  const TileItem at = tile_item(item, p.q_heads, p.kv_heads, p.q_len);
  QueryTile tile(at.rows, p.head_dim, p.scale);
  tile.set_queries<T>([&](int i) { return at.row<const T>(p.q, p.q_layout, i); });

  const bool dense = p.k_layout.position_stride == p.head_dim && p.v_layout.position_stride == p.head_dim;
  tile.attend<T>(
      {p.spans, at.batch, p.kv_len}, dense, [&](int key) { return at.key<const T>(p.k, p.k_layout, key); },
      [&](int key) { return at.key<const T>(p.v, p.v_layout, key); });

  tile.store_outputs<T>([&](int i) { return at.row<T>(p.out, p.out_layout, i); },
                        [&](int i) { return p.lse + at.lse_index(i, p.q_heads, p.q_len); });
}

}  // namespace

void block_attention_forward(const BlockAttentionParams& p, long begin, long end) {
  with_storage_type(p.dtype, [&]<class T>(T) {
    for (long item = begin; item < end; item++) attend_item<T>(p, item);
  });
}

}  // namespace dllm::cpu::DLLM_ISA
