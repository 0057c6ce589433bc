// skinny_linear for Hopper: TMA, wgmma, a warp that fetches; x in 16-bit values, the weight in the same or in
// bytes.
#pragma once

#include "cuda/skinny_linear/launch.h"
#include "cuda/skinny_linear/sm90/config.h"
#include "cuda/sm90/tensor_map.h"

namespace dllm::cuda::sm90 {

struct StreamedLinearParams {
  SplitLinearParams split;
  TensorMap x, weight;  // boxes of one panel; bytes of a weight in pairs
};

cudaError_t launch_linear(const SplitLinearParams& p, cudaStream_t stream);

template <class T, int kRows, bool kBytes>
cudaError_t launch_linear_kernel(const StreamedLinearParams& p, cudaStream_t stream);  // instantiations

}  // namespace dllm::cuda::sm90
