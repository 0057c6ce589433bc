#include "cuda/cached_attention/tiles.cuh"

namespace dllm::cuda {
template cudaError_t launch_cached_tiles<__nv_bfloat16, 64, false>(const SplitParams&, cudaStream_t);
template cudaError_t launch_cached_tiles<__nv_bfloat16, 64, true>(const SplitParams&, cudaStream_t);
template cudaError_t launch_cached_tiles<__nv_bfloat16, 128, false>(const SplitParams&, cudaStream_t);
template cudaError_t launch_cached_tiles<__nv_bfloat16, 128, true>(const SplitParams&, cudaStream_t);
template cudaError_t launch_cached_tiles<__nv_bfloat16, 256, false>(const SplitParams&, cudaStream_t);
template cudaError_t launch_cached_tiles<__nv_bfloat16, 256, true>(const SplitParams&, cudaStream_t);
}  // namespace dllm::cuda
