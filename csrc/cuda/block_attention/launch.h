// Launch of the block_attention kernel on a stream; float strides and pointers are multiples of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace dllm::cuda {

cudaError_t launch_block_attention(const BlockAttentionParams& p, cudaStream_t stream);

}  // namespace dllm::cuda
