#include "cuda/cached_attention/merge.cuh"
#include "cuda/cached_attention/plain.cuh"

namespace dllm::cuda {

cudaError_t launch_cached_plain(const SplitParams& p, cudaStream_t stream) {
  const CachedAttentionParams& a = p.attention;
  const int64_t rows = static_cast<int64_t>(a.q_len) * (a.q_heads / a.kv_heads);
  const int64_t row_tiles = (rows + kCachedPlainRows - 1) / kCachedPlainRows;
  return launch_ctas(cached_plain_kernel, row_tiles * a.kv_heads * p.max_splits * a.batch,
                     32 * kCachedPlainRows, 0, stream, p);
}

template cudaError_t launch_merge<float>(const SplitParams&, cudaStream_t);

}  // namespace dllm::cuda
