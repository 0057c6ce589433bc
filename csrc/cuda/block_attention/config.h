// What all block_attention kernels without wgmma keep to, and sizes that the backward pass shares; host and
// device read the same numbers.
#pragma once

#include <stddef.h>

namespace dllm::cuda {

constexpr size_t kSmallestSharedMemory = 99 * 1024;  // that a CTA can have on every GPU from Ampere on
constexpr size_t kSmallStatics = 3 * 1024;           // bounds and visible keys come on top of these plans

constexpr int kTermLanes = 8;        // that sum up dO·O of a query
constexpr int kQueryMultiple = 128;  // of every tile's queries

}  // namespace dllm::cuda
