// Which problems the Hopper kernels of block_attention take.
#pragma once

#include <stdint.h>

#include "core/params.h"

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

inline bool serves(const BlockAttentionBackwardParams& p, int capability) {
  return serves(p.forward, capability) &&
         is_mappable(p.grad_out, p.grad_out_layout, p.forward.batch, p.forward.q_heads);
}

}  // namespace dllm::cuda::sm90
