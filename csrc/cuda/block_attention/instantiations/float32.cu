#include "cuda/block_attention/kernel.cuh"

namespace dllm::cuda {
template cudaError_t launch_for_type<float>(const BlockAttentionParams&, cudaStream_t);
}
