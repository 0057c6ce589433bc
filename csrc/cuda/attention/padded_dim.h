// The head dims that attention kernels are compiled for.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

namespace dllm::cuda {

// launch(kDim) with the smallest padded head dim that holds `dim`, as a constant.
template <class Launch>
cudaError_t with_padded_dim(int dim, const Launch& launch) {
  if (dim <= 64) return launch(std::integral_constant<int, 64>());
  if (dim <= 128) return launch(std::integral_constant<int, 128>());
  return launch(std::integral_constant<int, 256>());
}

}  // namespace dllm::cuda
