#include "cpu/cached_attention.h"

#include "cpu/query_tile.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

template <typename T>
void attend_item(const CachedAttentionParams& p, int64_t item) {
  const TileItem at = tile_item(item, p.q_heads, p.kv_heads, p.q_len);
  const int length = p.q_lengths ? p.q_lengths[at.batch] : p.q_len;
  const int live = clamp(length * at.rows.group - at.rows.first, 0, at.rows.count);
  QueryTile tile({at.rows.first, live, at.rows.group}, p.head_dim, p.scale);
  tile.set_queries<T>([&](int i) { return at.row<const T>(p.q, p.q_layout, i); });

  if (live > 0) {
    const int32_t* pages = p.page_table + static_cast<int64_t>(at.batch) * p.table_length;
    const auto slot = [&](const void* cache, const PagesLayout& layout, int key) {
      return static_cast<const T*>(cache) + pages[key / p.page_size] * layout.page_stride +
             key % p.page_size * layout.slot_stride + at.kv_head * layout.head_stride;
    };
    tile.attend<T>(
        {p.cache_spans, at.batch, INT_MAX}, false,
        [&](int key) { return slot(p.cache_k, p.cache_k_layout, key); },
        [&](int key) { return slot(p.cache_v, p.cache_v_layout, key); });
    tile.attend<T>(
        {p.fresh_spans, at.batch, length}, false,
        [&](int key) { return at.key<const T>(p.k, p.k_layout, key); },
        [&](int key) { return at.key<const T>(p.v, p.v_layout, key); });
  }

  const auto out = [&](int i) { return at.row<T>(p.out, p.out_layout, i); };
  const auto lse = [&](int i) { return p.lse + at.lse_index(i, p.q_heads, p.q_len); };
  tile.store_outputs<T>(out, lse);
  for (int i = live; i < at.rows.count; i++) {
    memset(out(i), 0, sizeof(T) * p.head_dim);
    *lse(i) = -kInfinity;
  }
}

}  // namespace

void cached_block_attention(const CachedAttentionParams& p, long begin, long end) {
  with_storage_type(p.dtype, [&]<class T>(T) {
    for (long item = begin; item < end; item++) attend_item<T>(p, item);
  });
}

}  // namespace dllm::cpu::DLLM_ISA
