// Which problems the Hopper kernels of linear_token_stats take.
#pragma once

#include <stdint.h>

#include "core/params.h"

namespace dllm::cuda::sm90 {

// On a GPU of this compute capability, 90 for 9.0. TMA reads rows that begin at multiples of 16 bytes.
inline bool serves(const Projection& p, bool float64, int capability) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return capability == 90 && !float64 && p.hidden_type == p.weight_type && p.weight_type != DType::float32 &&
         p.hidden_size % 8 == 0 && p.weight_stride >= p.hidden_size && p.weight_stride % 8 == 0 &&
         p.weight_stride < int64_t{1} << 39 && aligned(p.hidden) && aligned(p.weight);
}

}  // namespace dllm::cuda::sm90
