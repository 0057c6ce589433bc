#include "cuda/block_attention/kernel.cuh"

namespace dllm::cuda {
template cudaError_t launch_for_type<__half>(const BlockAttentionParams&, cudaStream_t);
}
