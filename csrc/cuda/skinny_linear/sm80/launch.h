// skinny_linear by mma.sync, for every GPU from Ampere on; x in 16-bit values, the weight in the same or in
// bytes.
#pragma once

#include "cuda/skinny_linear/launch.h"

namespace dllm::cuda::sm80 {

template <class T>
cudaError_t launch_linear(const SplitLinearParams& p, cudaStream_t stream);  // instantiations

}  // namespace dllm::cuda::sm80
