// The host API: launches run at once, within the limits of the device.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <vector>

#include "cta.h"
#include "guarded_memory.h"
#include "shared_memory.h"
#include "static_variables.h"

namespace simt {
namespace {

constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr unsigned kMaxGridX = 0x7FFFFFFF, kMaxGridYZ = 65535;

// shared_bytes: static and dynamic shared memory that a CTA can ask for.
struct Device {
  int major, minor;
  size_t shared_bytes;
};
constexpr Device kDevices[] = {{8, 6, 99 * 1024}, {9, 0, kMaxSharedBytes}};  // 8.6 has the least
int device = 0;

using KernelOnDevice = std::pair<const void*, int>;
std::map<KernelOnDevice, size_t>& allowed_shared_bytes() {
  static std::map<KernelOnDevice, size_t> bytes;
  return bytes;
}

// Whether a CTA can have so much beside the kernel's variables: what was asked for, else what is left of 48
// KiB.
bool fits(const void* kernel, size_t dynamic_bytes) {
  const size_t statics = static_bytes_of(kernel);
  const auto asked = allowed_shared_bytes().find({kernel, device});
  if (asked == allowed_shared_bytes().end()) return statics + dynamic_bytes <= kDefaultSharedBytes;
  return dynamic_bytes <= asked->second && statics + dynamic_bytes <= kDevices[device].shared_bytes;
}

struct Running {  // nothing runs any more, however a launch ends
  ~Running() { cta.finish(); }
};

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
    return cudaErrorInvalidConfiguration;
  if (!fits(kernel, config.dynamicSmemBytes)) return cudaErrorInvalidValue;
  bool overlapping = false;
  for (unsigned i = 0; i < config.numAttrs; i++)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return cudaErrorNotSupported;
    else if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
      overlapping = config.attrs[i].val.programmaticStreamSerializationAllowed;

  static std::mutex one_at_a_time;
  const std::lock_guard guard(one_at_a_time);
  const Running running;
  const FaultsReported faults;
  cta.start(kernel, grid, block, overlapping, thread);
  reserve_shared_memory(config.dynamicSmemBytes, static_cast<int>(threads));
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  cta.order.arrange(blocks);
  for (const uint64_t b : blocks) {
    cta.run({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
             static_cast<unsigned>(b / grid.x / grid.y)});
  }
  end_use_of_statics(kernel);
  return fits(kernel, config.dynamicSmemBytes) ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace simt

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  const size_t most = simt::kDevices[simt::device].shared_bytes;
  if (value < 0 || value + simt::static_bytes_of(kernel) > most) return cudaErrorInvalidValue;
  simt::allowed_shared_bytes()[{kernel, simt::device}] = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  attributes->sharedSizeBytes = simt::static_bytes_of(kernel);
  attributes->ptxVersion = 10 * simt::kDevices[simt::device].major;
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
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

cudaError_t cudaGetDevice(int* device) { return *device = simt::device, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const auto [major, minor, shared_bytes] = simt::kDevices[device];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 8; break;  // few, so that small problems fill them
    case cudaDevAttrComputeCapabilityMajor: *value = major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_bytes + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_bytes; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

// ---- what Python asks for
extern "C" {
[[gnu::visibility("default")]] void simt_set_order(unsigned seed) { simt::cta.order.seed = seed; }
[[gnu::visibility("default")]] void simt_set_capability(int major) { simt::device = major >= 9; }
[[gnu::visibility("default")]] void simt_guard_tensors(bool on) { simt::guard_tensors(on); }
[[gnu::visibility("default")]] uint64_t simt_switches() { return simt::switches; }
}
