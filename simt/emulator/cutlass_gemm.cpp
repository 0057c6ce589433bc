// In place of the kernels of CUTLASS, which the emulator cannot run: what they compute, in plain loops over
// the same arguments.
#include "cuda/skinny_linear/cutlass/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/e4m3.h"

namespace dllm::cuda::cutlass_gemm {
namespace {

float value_at(const void* data, DType type, int64_t at) {
  return type == DType::bfloat16 ? static_cast<float>(static_cast<const __nv_bfloat16*>(data)[at])
                                 : static_cast<float>(static_cast<const __half*>(data)[at]);
}

float value_of_x(const SkinnyLinearParams& p, int64_t at) {
  return p.e4m3 ? static_cast<const E4m3*>(p.x)[at].value() : value_at(p.x, p.x_type, at);
}

float value_of_weight(const SkinnyLinearParams& p, int64_t at) {
  return p.e4m3 ? static_cast<const E4m3*>(p.weight)[at].value() : static_cast<const int8_t*>(p.weight)[at];
}

}  // namespace

size_t linear_workspace(const SkinnyLinearParams&) { return 0; }

cudaError_t launch_linear(const SkinnyLinearParams& p, void*, cudaStream_t) {
  for (int64_t row = 0; row < p.rows; row++)
    for (int64_t output = 0; output < p.outputs; output++) {
      float sum = 0;
      for (int64_t input = 0; input < p.inputs; input++)
        sum += value_of_x(p, row * p.inputs + input) * value_of_weight(p, output * p.weight_stride + input);
      sum *= p.scales[output] * (p.x_scales ? p.x_scales[row] : 1.0f);
      const float result = p.bias ? sum + value_at(p.bias, p.x_type, output) : sum;
      const int64_t at = row * p.outputs + output;
      if (p.x_type == DType::bfloat16) static_cast<__nv_bfloat16*>(p.out)[at] = __nv_bfloat16(result);
      else static_cast<__half*>(p.out)[at] = __half(result);
    }
  return cudaSuccess;
}

}  // namespace dllm::cuda::cutlass_gemm
