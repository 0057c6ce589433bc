// Hopper kernels of block_attention: TMA, wgmma, specialised warpgroups; head dims 64 and 128, 16-bit types.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "cuda/block_attention/sm90/config.h"
#include "cuda/sm90/tensor_map.h"

namespace dllm::cuda::sm90 {

// Can TMA read tensors of this layout? Expanded dimensions have no stride that it takes.
inline bool is_mappable(const void* data, const HeadsLayout& layout, int batch, int heads) {
  const auto fits = [](int64_t stride, int size) {
    return size == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39);
  };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(layout.position_stride, 2) &&
         fits(layout.head_stride, heads) && fits(layout.batch_stride, batch);
}

// Whether these kernels are the ones for this problem on a GPU of this compute capability, 90 for 9.0.
inline bool serves(const BlockAttentionParams& p, int capability) {
  return capability == 90 && p.dtype != DType::float32 && (p.head_dim == 64 || p.head_dim == 128) &&
         p.batch > 0 && p.q_len > 0 && p.kv_len > 0 && is_mappable(p.q, p.q_layout, p.batch, p.q_heads) &&
         is_mappable(p.k, p.k_layout, p.batch, p.kv_heads) &&
         is_mappable(p.v, p.v_layout, p.batch, p.kv_heads);
}

struct ForwardParams {
  BlockAttentionParams attention;
  WorkOrder order;
  TensorMap q, k, v;  // [batch, heads, positions, head_dim], boxes of one tile's rows and 64 dims
};

cudaError_t launch_forward(const BlockAttentionParams& p, cudaStream_t stream);

template <class T, int kDim>
cudaError_t launch_forward_kernel(const ForwardParams& p, int ctas, cudaStream_t stream);  // instantiations/*.cu

}  // namespace dllm::cuda::sm90
