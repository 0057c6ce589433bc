#include "cuda/sm90/tensor_map.h"

#include "cuda/sm90/matrix_descriptor.h"

namespace dllm::cuda {
namespace {

// The driver's function, found at run time: machines that only build have no driver to link.
using Encode = decltype(&cuTensorMapEncodeTiled);
Encode encode_function() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                                cudaEnableDefault, &result);
    const bool found = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return encode;
}

// The driver encodes for the context of the calling thread: one that has launched nothing has none yet.
cudaError_t bind_context() {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status == cudaSuccess ? cudaSetDevice(device) : status;
}

template <int kRank>
cudaError_t encode_shape(TensorMap& map, DType dtype, const void* data, const TensorShape<kRank>& shape) {
  const Encode encode = encode_function();
  if (!encode) return cudaErrorNotSupported;
  if (dtype == DType::float32) return cudaErrorInvalidValue;
  const cudaError_t status = bind_context();
  if (status != cudaSuccess) return status;
  uint32_t element_strides[kRank];
  for (uint32_t& stride : element_strides) stride = 1;
  const CUresult result = encode(
      &map, dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      kRank, const_cast<void*>(data), shape.sizes, shape.byte_strides, shape.box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // none: zeros
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t encode_tensor_map(TensorMap& map, DType dtype, const void* data, const TensorShape<2>& shape) {
  return encode_shape(map, dtype, data, shape);
}
cudaError_t encode_tensor_map(TensorMap& map, DType dtype, const void* data, const TensorShape<4>& shape) {
  return encode_shape(map, dtype, data, shape);
}

cudaError_t encode_panel_map(TensorMap& map, DType dtype, const void* data, int64_t rows, int64_t columns,
                             int64_t stride, int box_rows) {
  const TensorShape<2> shape{{static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
                             {static_cast<uint64_t>(2 * stride)},
                             {kPanelColumns, static_cast<uint32_t>(box_rows)}};
  return encode_shape(map, dtype, data, shape);
}

}  // namespace dllm::cuda
