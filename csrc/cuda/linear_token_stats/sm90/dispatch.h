// Which problems the Hopper kernels of linear_token_stats take.
#pragma once

#include "core/params.h"
#include "cuda/sm90/weight_stream.h"

namespace dllm::cuda::sm90 {

// On a GPU of this compute capability, 90 for 9.0.
inline bool serves(const Projection& p, bool float64, int capability) {
  return capability == 90 && !float64 && p.hidden_type == p.weight_type &&
         can_stream(p.hidden, p.weight, p.weight_type, p.hidden_size, p.weight_stride);
}

}  // namespace dllm::cuda::sm90
