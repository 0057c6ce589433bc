// Where the rows of one sequence and head begin in a [batch, heads, positions, head_dim] tensor.
#pragma once

#include <cuda_runtime.h>

#include "core/params.h"

namespace dllm::cuda {

template <class T>
__device__ const T* head_pointer(const void* data, const HeadsLayout& layout, int64_t batch, int head) {
  return static_cast<const T*>(data) + batch * layout.batch_stride + head * layout.head_stride;
}

template <class T>
__device__ T* head_pointer(void* data, const HeadsLayout& layout, int64_t batch, int head) {
  return static_cast<T*>(data) + batch * layout.batch_stride + head * layout.head_stride;
}

}  // namespace dllm::cuda
