// The one way kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace dllm::cuda {

// Raises `limit` of `kernel` on the current device to all the dynamic shared memory that a CTA can have there
// beside the kernel's own variables, which count too. Without it the sum of both may be 48 KiB at most.
inline cudaError_t raise_shared_limit(const void* kernel, int device, size_t& limit) {
  int most = 0;
  cudaError_t status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncAttributes attributes{};
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  const int dynamic = most - static_cast<int>(attributes.sharedSizeBytes);
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
  if (status == cudaSuccess) limit = dynamic;
  return status;
}

// Lets launches of `kernel` on the current device have `bytes` of dynamic shared memory. The limit is raised
// once for each kernel and device, so that threads which launch one kernel with different sizes agree.
inline cudaError_t allow_shared_memory(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> limits;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard lock(mutex);
  auto known = limits.find({kernel, device});
  if (known == limits.end()) {
    size_t limit = 0;
    status = raise_shared_limit(kernel, device, limit);
    if (status != cudaSuccess) return status;
    known = limits.insert({{kernel, device}, limit}).first;
  }
  return bytes <= known->second ? cudaSuccess : cudaErrorLaunchOutOfResources;
}

// Whether `kernel` on the current device is code in which griddepcontrol_wait() waits: that for GPUs before
// Hopper is not. Asked of the driver once for each kernel and device.
inline cudaError_t can_overlap(const void* kernel, bool& can) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> answers;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard lock(mutex);
  auto known = answers.find({kernel, device});
  if (known == answers.end()) {
    cudaFuncAttributes compiled{};
    status = cudaFuncGetAttributes(&compiled, kernel);
    if (status != cudaSuccess) return status;
    known = answers.insert({{kernel, device}, compiled.ptxVersion >= 90}).first;
  }
  can = known->second;
  return cudaSuccess;
}

// One CTA of `threads` threads and `shared_bytes` of dynamic shared memory for each cell of `grid`, with the
// attributes of `config`.
template <class... Parameters>
cudaError_t launch_configured(cudaLaunchConfig_t config, void (*kernel)(Parameters...), dim3 grid,
                              int threads, size_t shared_bytes, cudaStream_t stream,
                              const Parameters&... arguments) {
  if (shared_bytes > 0) {
    const cudaError_t status = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (status != cudaSuccess) return status;
  }
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Begins when all that was launched before has ended.
template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                          cudaStream_t stream, const Parameters&... arguments) {
  return launch_configured({}, kernel, grid, threads, shared_bytes, stream, arguments...);
}

// Begins as soon as the kernel before allows it, so that launch and prologue cost no time of their own: every
// CTA of the kernel calls griddepcontrol_wait(). Kernels compiled for GPUs before Hopper do not wait there,
// and begin when the kernel before has ended.
template <class... Parameters>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                               cudaStream_t stream, const Parameters&... arguments) {
  bool overlaps = false;
  const cudaError_t status = can_overlap(reinterpret_cast<const void*>(kernel), overlaps);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute overlapping{};
  overlapping.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlapping.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.attrs = &overlapping;
  config.numAttrs = overlaps;
  return launch_configured(config, kernel, grid, threads, shared_bytes, stream, arguments...);
}

// A row of `ctas` CTAs, none included.
template <class... Parameters>
cudaError_t launch_ctas(void (*kernel)(Parameters...), int64_t ctas, int threads, size_t shared_bytes,
                        cudaStream_t stream, const Parameters&... arguments) {
  if (ctas == 0) return cudaSuccess;
  if (ctas > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_kernel(kernel, static_cast<unsigned>(ctas), threads, shared_bytes, stream, arguments...);
}

// The same with launch_overlapping.
template <class... Parameters>
cudaError_t launch_overlapping_ctas(void (*kernel)(Parameters...), int64_t ctas, int threads,
                                    size_t shared_bytes, cudaStream_t stream,
                                    const Parameters&... arguments) {
  if (ctas == 0) return cudaSuccess;
  if (ctas > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_overlapping(kernel, static_cast<unsigned>(ctas), threads, shared_bytes, stream, arguments...);
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
