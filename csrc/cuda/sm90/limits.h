// Sizes that Hopper sets, for host and device.
#pragma once

#include <stddef.h>

namespace dllm::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr int kRegisters = 64 * 1024;  // of a multiprocessor

// Of each thread of a CTA that is alone on its multiprocessor, as it begins.
constexpr int registers_at_entry(int threads) { return kRegisters / threads / 8 * 8; }

// Whether a producer warpgroup and its consumers may divide the CTA's registers so. The consumers of a
// division that asks for more wait for ever.
constexpr bool can_divide_registers(int producer, int consumer, int consumers) {
  const int warpgroups = 1 + consumers;
  return producer + consumers * consumer <= warpgroups * registers_at_entry(kWarpgroup * warpgroups);
}
static_assert(can_divide_registers(56, 224, 2) && !can_divide_registers(64, 224, 2), "504 registers");

}  // namespace dllm::cuda::sm90
