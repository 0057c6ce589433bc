#include "cuda/cached_attention/fp32.cuh"

namespace dllm::cuda {

cudaError_t launch_cached_fp32(const SplitParams& p, cudaStream_t stream) {
  const CachedAttentionParams& a = p.attention;
  const int64_t rows = static_cast<int64_t>(a.q_len) * (a.q_heads / a.kv_heads);
  const int64_t row_tiles = (rows + kCachedFp32Rows - 1) / kCachedFp32Rows;
  return launch_overlapping_ctas(cached_fp32_kernel, row_tiles * a.kv_heads * p.max_splits * a.batch,
                                 32 * kCachedFp32Rows, 0, stream, p);
}

}  // namespace dllm::cuda
