// Checks of paged caches and page tables, shared by cached_block_attention and kv_write_, CPU and CUDA.
#pragma once

#include "core/params.h"
#include "torch/checks.h"

namespace dllm {

// Strides in units of `scale` elements (the element size for strides in bytes).
inline PagesLayout pages_layout(const Tensor& cache, int64_t scale = 1) {
  return {cache.stride(0) * scale, cache.stride(1) * scale, cache.stride(2) * scale};
}

// cache_k and cache_v [pages, page_size, kv_heads, head_dim] that hold the heads of k [B, kv_heads, T, D].
inline void check_caches(const char* op, const Tensor& cache_k, const Tensor& cache_v, const Tensor& k) {
  for (const auto& [name, cache] : {std::pair<const char*, const Tensor&>{"cache_k", cache_k},
                                    std::pair<const char*, const Tensor&>{"cache_v", cache_v}}) {
    check_dims(op, name, cache, 4, "[pages, page_size, kv_heads, head_dim]");
    check_same_dtype(op, name, cache, "k", k);
    check_same_device(op, name, cache, "k", k);
    check_size(op, name, cache, 2, k.size(1), "the kv heads of k");
    check_size(op, name, cache, 3, k.size(3), "the head dim of k");
    check(cache.size(1) >= 1, op, ": ", name, " must have a page_size of at least 1, got shape ",
          shape_text(cache));
    check(cache.stride(3) == 1, op, ": ", name, " must be contiguous in its last dimension, got stride ",
          cache.stride(3));
    check_int(op, (std::string(name) + ".shape[0]").c_str(), cache.size(0));
    check_int(op, (std::string(name) + ".shape[1]").c_str(), cache.size(1));
  }
  for (int64_t dim = 0; dim < 2; dim++)
    check_size(op, "cache_v", cache_v, dim, cache_k.size(dim), "as in cache_k");
}

inline void check_page_table(const char* op, const Tensor& page_table, const Tensor& k, int64_t page_size) {
  check_dims(op, "page_table", page_table, 2, "[batch, pages]");
  check_dtype(op, "page_table", page_table, {ScalarType::Int});
  check_same_device(op, "page_table", page_table, "k", k);
  check_size(op, "page_table", page_table, 0, k.size(0), "the batch size of k");
  check_int(op, "page_table.shape[1]", page_table.size(1));
  check_int(op, "page_table.shape[1] times page_size", page_table.size(1) * page_size);
}

// Contents, on the CPU only.
inline void check_page(const char* op, const int32_t* table, int64_t b, int64_t entry, int64_t pages) {
  check(0 <= table[entry] && table[entry] < pages, op, ": page_table[", b, ", ", entry,
        "] must be a page from 0 to ", pages - 1, ", got ", table[entry]);
}

}  // namespace dllm
