// Sizes that Hopper sets, for host and device.
#pragma once

#include <stddef.h>

namespace dllm::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads
constexpr size_t kMaxSharedBytes = 227 * 1024;

}  // namespace dllm::cuda::sm90
