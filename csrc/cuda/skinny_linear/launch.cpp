#include "cuda/skinny_linear/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch_kernel.h"
#include "cuda/skinny_linear/dispatch.h"
#include "cuda/skinny_linear/sm80/launch.h"
#ifdef DLLM_CUDA_HAS_SM90A
#include "cuda/skinny_linear/sm90/launch.h"
#endif

namespace dllm::cuda {
namespace {

// The kernel that the library has for a problem on the current device.
LinearKernel compiled_kernel(const SkinnyLinearParams& p) {
  const LinearKernel kernel = linear_kernel(p, compute_capability());
#ifndef DLLM_CUDA_HAS_SM90A
  if (kernel == LinearKernel::sm90) return LinearKernel::sm80;
#endif
  return kernel;
}

LinearSplits splits_of(const SkinnyLinearParams& p) {
  return linear_splits(p.outputs, p.inputs, p.scales ? 1 : 2);
}

}  // namespace

int64_t skinny_linear_workspace(const SkinnyLinearParams& p) {
  if (compiled_kernel(p) == LinearKernel::any_types) return 0;
  const int splits = splits_of(p).splits;
  return splits == 1 ? 0 : splits * p.rows * p.outputs;
}

cudaError_t launch_skinny_linear(const SkinnyLinearParams& p, float* workspace, cudaStream_t stream) {
  const LinearKernel kernel = compiled_kernel(p);
  if (kernel == LinearKernel::any_types) return launch_linear_of_any_types(p, stream);
  const SplitLinearParams split{p, splits_of(p), workspace};
  cudaError_t status = cudaErrorNotSupported;
#ifdef DLLM_CUDA_HAS_SM90A
  if (kernel == LinearKernel::sm90) status = sm90::launch_linear(split, stream);
#endif
  if (kernel == LinearKernel::sm80)
    status = p.x_type == DType::bfloat16 ? sm80::launch_linear<__nv_bfloat16>(split, stream)
                                         : sm80::launch_linear<__half>(split, stream);
  return status == cudaSuccess && split.splits.splits > 1 ? launch_linear_merge(split, stream) : status;
}

}  // namespace dllm::cuda
