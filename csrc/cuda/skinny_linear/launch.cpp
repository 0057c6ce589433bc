#include "cuda/skinny_linear/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch_kernel.h"
#include "cuda/skinny_linear/dispatch.h"
#include "cuda/skinny_linear/sm80/launch.h"
#ifdef DLLM_CUDA_HAS_SM90A
#include "cuda/skinny_linear/sm90/launch.h"
#endif
#ifdef DLLM_CUDA_HAS_CUTLASS
#include "cuda/skinny_linear/cutlass/launch.h"
#endif

namespace dllm::cuda {
namespace {

#ifdef DLLM_CUDA_HAS_CUTLASS
constexpr bool kHasCutlass = true;
#else
constexpr bool kHasCutlass = false;
#endif

// The kernel that the library has for a problem on the current device.
LinearKernel compiled_kernel(const SkinnyLinearParams& p) {
  const LinearKernel kernel = linear_kernel(p, compute_capability(), kHasCutlass);
#ifndef DLLM_CUDA_HAS_SM90A
  if (kernel == LinearKernel::sm90) return LinearKernel::sm80;
#endif
  return kernel;
}

LinearSplits splits_of(const SkinnyLinearParams& p) {
  return linear_splits(p.outputs, p.inputs, p.scales ? 1 : 2);
}

// Where the parts of the workspace begin. x and its scales are there for a weight in e4m3.
struct Workspace {
  int64_t x = 0, x_scales = 0, sums = 0, size = 0;

  Workspace(const SkinnyLinearParams& p, LinearKernel kernel) {
    if (p.e4m3) {
      const int value_bytes = kernel == LinearKernel::cutlass ? 1 : p.x_type == DType::float32 ? 4 : 2;
      x_scales = rounded_up(p.rows * p.inputs * value_bytes);
      sums = x_scales + rounded_up(p.rows * static_cast<int64_t>(sizeof(float)));
    }
    size = sums + sum_bytes(p, kernel);
  }

 private:
  static int64_t rounded_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

  static int64_t sum_bytes(const SkinnyLinearParams& p, LinearKernel kernel) {
    if (kernel == LinearKernel::any_types) return 0;
#ifdef DLLM_CUDA_HAS_CUTLASS
    if (kernel == LinearKernel::cutlass) return cutlass_gemm::linear_workspace(p);
#endif
    const int splits = splits_of(p).splits;
    return splits == 1 ? 0 : splits * p.rows * p.outputs * static_cast<int64_t>(sizeof(float));
  }
};

cudaError_t launch_product(const SkinnyLinearParams& p, LinearKernel kernel, void* sums,
                           cudaStream_t stream) {
  if (kernel == LinearKernel::any_types) return launch_linear_of_any_types(p, stream);
#ifdef DLLM_CUDA_HAS_CUTLASS
  if (kernel == LinearKernel::cutlass) return cutlass_gemm::launch_linear(p, sums, stream);
#endif
  const LinearSplits splits = splits_of(p);
  const SplitLinearParams split{p, splits, splits.splits == 1 ? nullptr : static_cast<float*>(sums)};
  cudaError_t status = cudaErrorNotSupported;
#ifdef DLLM_CUDA_HAS_SM90A
  if (kernel == LinearKernel::sm90) status = sm90::launch_linear(split, stream);
#endif
  if (kernel == LinearKernel::sm80)
    status = p.x_type == DType::bfloat16 ? sm80::launch_linear<__nv_bfloat16>(split, stream)
                                         : sm80::launch_linear<__half>(split, stream);
  return status == cudaSuccess && splits.splits > 1 ? launch_linear_merge(split, stream) : status;
}

}  // namespace

int64_t skinny_linear_workspace(const SkinnyLinearParams& p) { return Workspace(p, compiled_kernel(p)).size; }

cudaError_t launch_skinny_linear(const SkinnyLinearParams& p, void* workspace, cudaStream_t stream) {
  const LinearKernel kernel = compiled_kernel(p);
  const Workspace at(p, kernel);
  unsigned char* begin = static_cast<unsigned char*>(workspace);
  if (!p.e4m3) return launch_product(p, kernel, begin, stream);
  SkinnyLinearParams quantized = p;
  auto* scales = reinterpret_cast<float*>(begin + at.x_scales);
  const cudaError_t status =
      launch_quantize_rows(p, begin + at.x, kernel == LinearKernel::cutlass, scales, stream);
  quantized.x = begin + at.x, quantized.x_scales = scales;
  return status == cudaSuccess ? launch_product(quantized, kernel, begin + at.sums, stream) : status;
}

}  // namespace dllm::cuda
