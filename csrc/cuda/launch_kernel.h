// The one way kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

namespace dllm::cuda {

constexpr size_t kDefaultSharedBytes = 48 * 1024;  // more has to be asked for, kernel by kernel

// One CTA of `threads` threads and `shared_bytes` of dynamic shared memory for each cell of `grid`.
template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                          cudaStream_t stream, const Parameters&... arguments) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A row of `ctas` CTAs, none included.
template <class... Parameters>
cudaError_t launch_ctas(void (*kernel)(Parameters...), int64_t ctas, int threads, size_t shared_bytes,
                        cudaStream_t stream, const Parameters&... arguments) {
  if (ctas == 0) return cudaSuccess;
  if (ctas > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_kernel(kernel, static_cast<unsigned>(ctas), threads, shared_bytes, stream, arguments...);
}

// Of the current device: 90 for 9.0.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return 0;
  return 10 * major + minor;
}

}  // namespace dllm::cuda
