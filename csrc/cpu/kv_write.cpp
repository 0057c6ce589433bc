#include "cpu/kv_write.h"

#include <string.h>

namespace dllm::cpu::DLLM_ISA {

void kv_write(const KvWriteParams& p, long begin, long end) {
  for (long head = begin; head < end; head++) {
    const auto copy = [&](const void* from, const HeadsLayout& row, void* to, const PagesLayout& cache, int b,
                          int t, int page, int slot) {
      memcpy(static_cast<char*>(to) + page * cache.page_stride + slot * cache.slot_stride +
                 head * cache.head_stride,
             static_cast<const char*>(from) + b * row.batch_stride + head * row.head_stride +
                 t * row.position_stride,
             p.row_bytes);
    };
    for (int b = 0; b < p.batch; b++) {
      for (int t = 0; t < p.length; t++) {
        const int position = p.positions[static_cast<int64_t>(b) * p.length + t];
        if (position < 0) continue;
        const int page = p.page_table[static_cast<int64_t>(b) * p.table_length + position / p.page_size];
        copy(p.k, p.k_layout, p.cache_k, p.cache_k_layout, b, t, page, position % p.page_size);
        copy(p.v, p.v_layout, p.cache_v, p.cache_v_layout, b, t, page, position % p.page_size);
      }
    }
  }
}

}  // namespace dllm::cpu::DLLM_ISA
