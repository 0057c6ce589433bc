// The host API: launches run at once, within the limits of the device.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <mutex>

#include "cta.h"
#include "guarded_memory.h"
#include "shared_memory.h"

namespace simt {
namespace {

constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr unsigned kMaxGridX = 0x7FFFFFFF, kMaxGridYZ = 65535;

int capability = 8;  // major

std::map<const void*, int>& allowed_shared_bytes() {
  static std::map<const void*, int> bytes;
  return bytes;
}

struct Running {  // nothing runs any more, however a launch ends
  ~Running() { cta.finish(); }
};

}  // namespace

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > static_cast<int>(kMaxSharedBytes)) return cudaErrorInvalidValue;
  allowed_shared_bytes()[kernel] = value;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const auto allowed = allowed_shared_bytes().find(kernel);
  const size_t shared = allowed == allowed_shared_bytes().end()
                            ? kDefaultSharedBytes
                            : std::max<size_t>(allowed->second, kDefaultSharedBytes);
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > shared) return cudaErrorInvalidValue;
  for (unsigned i = 0; i < config.numAttrs; i++)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return cudaErrorNotSupported;

  static std::mutex one_at_a_time;
  const std::lock_guard guard(one_at_a_time);
  const Running running;
  const FaultsReported faults;
  cta.start(kernel, grid, block, thread);
  reserve_shared_memory(config.dynamicSmemBytes, static_cast<int>(threads));
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; i++) {
    const uint64_t b = cta.order.seed == 1 ? blocks - 1 - i : i;
    cta.run({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
             static_cast<unsigned>(b / grid.x / grid.y)});
  }
  return cudaSuccess;
}

}  // namespace simt

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
  }
  return "unknown error";
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  memset(to, byte, bytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 8; break;  // few, so that small problems fill them
    case cudaDevAttrComputeCapabilityMajor: *value = simt::capability; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = simt::kMaxSharedBytes + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = simt::kMaxSharedBytes; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

// ---- what Python asks for
extern "C" {
[[gnu::visibility("default")]] void simt_set_order(unsigned seed) { simt::cta.order.seed = seed; }
[[gnu::visibility("default")]] void simt_set_capability(int major) { simt::capability = major; }
[[gnu::visibility("default")]] void simt_guard_tensors(bool on) { simt::guard_tensors(on); }
[[gnu::visibility("default")]] uint64_t simt_switches() { return simt::switches; }
}
