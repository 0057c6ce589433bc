#include "cuda/kv_write/kernel.cuh"
#include "cuda/kv_write/launch.h"
#include "cuda/launch_kernel.h"

namespace dllm::cuda {
namespace {

bool aligned(const KvWriteParams& p, int64_t bytes) {
  const auto fits = [&](const void* data, int64_t a, int64_t b, int64_t c) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 && a % bytes == 0 && b % bytes == 0 &&
           c % bytes == 0;
  };
  const auto rows = [&](const void* data, const HeadsLayout& layout) {
    return fits(data, layout.batch_stride, layout.head_stride, layout.position_stride);
  };
  const auto pages = [&](const void* data, const PagesLayout& layout) {
    return fits(data, layout.page_stride, layout.slot_stride, layout.head_stride);
  };
  return p.row_bytes % bytes == 0 && rows(p.k, p.k_layout) && rows(p.v, p.v_layout) &&
         pages(p.cache_k, p.cache_k_layout) && pages(p.cache_v, p.cache_v_layout);
}

}  // namespace

cudaError_t launch_kv_write(const KvWriteParams& p, cudaStream_t stream) {
  const int64_t tokens = static_cast<int64_t>(p.batch) * p.length;
  if (tokens * p.kv_heads * p.row_bytes == 0) return cudaSuccess;
  const auto kernel = aligned(p, 16) ? kv_write_kernel<uint4> : kv_write_kernel<uint16_t>;
  return launch_overlapping_ctas(kernel, tokens, kWriteThreads, 0, stream, p);
}

}  // namespace dllm::cuda
