// Tensor maps: how TMA knows a tensor of 16-bit elements in global memory. Kernels take them as
// __grid_constant__ parameters.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/params.h"

namespace dllm::cuda {

using TensorMap = CUtensorMap;

// Innermost dimension first: that one is contiguous. A load brings box[i] neighbours along each dimension
// (at most 256; box[0] is 64) as a panel of matrix_descriptor.h. `data` and the strides are multiples of 16
// bytes, strides less than 2^40.
template <int kRank>
struct TensorShape {
  uint64_t sizes[kRank];             // none is 0
  uint64_t byte_strides[kRank - 1];  // of dimensions 1 and up
  uint32_t box[kRank];
};

// cudaErrorNotSupported where the driver is too old for tensor maps.
cudaError_t encode_tensor_map(TensorMap& map, DType dtype, const void* data, const TensorShape<2>& shape);
cudaError_t encode_tensor_map(TensorMap& map, DType dtype, const void* data, const TensorShape<4>& shape);

// Of `rows` rows of `columns` values, `stride` apart: boxes of one panel of box_rows rows.
cudaError_t encode_panel_map(TensorMap& map, DType dtype, const void* data, int64_t rows, int64_t columns,
                             int64_t stride, int box_rows);

}  // namespace dllm::cuda
