// Launches of the block_attention kernels on a stream; float strides and pointers are multiples of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace dllm::cuda {

cudaError_t launch_block_attention(const BlockAttentionParams& p, cudaStream_t stream);

// One kernel for each 16-bit type and padded head dim, on tensor cores (instantiations/forward_*.cu).
template <class T, int kDim>
cudaError_t launch_forward(const BlockAttentionParams& p, cudaStream_t stream);

// float32 on the CUDA cores (instantiations/plain_float32.cu).
template <int kDim>
cudaError_t launch_plain_forward(const BlockAttentionParams& p, cudaStream_t stream);

}  // namespace dllm::cuda
