// The head dims that attention kernels are compiled for.
#pragma once

#include <type_traits>

namespace dllm::cuda {

// visit(kDim) with the smallest padded head dim that holds `dim`, as a constant.
template <class Visit>
auto with_padded_dim(int dim, const Visit& visit) {
  if (dim <= 64) return visit(std::integral_constant<int, 64>());
  if (dim <= 128) return visit(std::integral_constant<int, 128>());
  return visit(std::integral_constant<int, 256>());
}

}  // namespace dllm::cuda
