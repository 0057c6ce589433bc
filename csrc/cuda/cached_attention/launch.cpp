#include "cuda/cached_attention/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/cached_attention/config.h"
#include "cuda/tiles/padded_dim.h"

namespace dllm::cuda {
namespace {

template <class T>
cudaError_t launch_on_tensor_cores(const SplitParams& p, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(p.attention.q_len) * (p.attention.q_heads / p.attention.kv_heads);
  return with_padded_dim(p.attention.head_dim, [&](auto dim) {
    return CachedTiles<dim, true>::fits(rows) ? launch_cached_tiles<T, dim, true>(p, stream)
                                              : launch_cached_tiles<T, dim, false>(p, stream);
  });
}

}  // namespace

void plan_splits(SplitParams& p) {
  const CachedAttentionParams& a = p.attention;
  const auto tiles = [](int64_t keys) { return static_cast<int>((keys + kCachedKeys - 1) / kCachedKeys); };
  const int group = a.q_heads / a.kv_heads;
  // A row with fewer live queries may be split more often.
  const int fewest_rows = (a.q_lengths ? 1 : a.q_len) * group;
  const int key_tiles = tiles(static_cast<int64_t>(a.table_length) * a.page_size) + tiles(a.q_len);
  p.max_splits = split_count(a.head_dim, key_tiles, a.kv_heads, fewest_rows);
  p.partial_rows = partial_rows(a.head_dim, p.max_splits, a.kv_heads, static_cast<int64_t>(a.q_len) * group);
}

bool takes_fresh_tokens(DType dtype, int64_t head_dim, bool rotates) {
  const bool halves_in_chunks = head_dim % 16 == 0;
  return dtype != DType::float32 && (halves_in_chunks || !rotates);
}

int64_t plan_size(const CachedAttentionParams& p) {
  const int64_t rows = static_cast<int64_t>(p.q_len) * (p.q_heads / p.kv_heads);
  return p.batch * (sizeof(PlannedSequence) / sizeof(int32_t) + p.kv_heads * counters_of_head(rows));
}

CachedPlan plan_at(int32_t* data, const CachedAttentionParams& p) {
  const auto sequences = reinterpret_cast<PlannedSequence*>(data);
  return {sequences, reinterpret_cast<unsigned*>(sequences + p.batch)};
}

cudaError_t launch_cached_attention(const SplitParams& p, cudaStream_t stream) {
  switch (p.attention.dtype) {
    case DType::bfloat16: return launch_on_tensor_cores<__nv_bfloat16>(p, stream);
    case DType::float16: return launch_on_tensor_cores<__half>(p, stream);
    case DType::float32: return launch_cached_fp32(p, stream);
    case DType::float64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace dllm::cuda
