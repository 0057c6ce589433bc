// How Hopper's matrix units find an operand in shared memory. Operands are made of panels: 64 neighbouring
// 16-bit elements of each of some rows, 128 bytes to a row, rows one after the other, the 16-byte pieces of a
// row permuted by the row's number (the 128-byte swizzle), as TMA writes them. A panel begins at a multiple
// of 1024 bytes. Wider rows are several panels, one behind the other.
#pragma once

#include <stdint.h>

#include "core/host_device.h"

namespace dllm::cuda {

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kPanelAlignment = 1024;  // eight rows, after which the permutation repeats
constexpr int kWgmmaDepth = 16;        // elements that one product sums over

constexpr DLLM_HOST_DEVICE int panel_bytes(int rows) { return rows * kPanelRowBytes; }

// Where byte `byte` of row `row` lies in its panel.
constexpr DLLM_HOST_DEVICE int swizzled_offset(int row, int byte) {
  return row * kPanelRowBytes + (byte ^ (row % 8 * 16));
}

// Which index of the operand runs along a panel's rows: that of the sum (k), or that of the result (mn).
enum class Major { k, mn };

// The descriptor of an operand from shared address `address` on; leading_bytes and stride_bytes as its layout
// wants them.
constexpr DLLM_HOST_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes,
                                                      uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{stride_bytes >> 4 & 0x3fff} << 32 |
         uint64_t{leading_bytes >> 4 & 0x3fff} << 16 | (address >> 4 & 0x3fff);
}

// Rows are result rows (or columns), the sum runs along them: eight of them lie kPanelAlignment apart from
// the next eight. `panels`: the shared address of the operand's first row in its first panel.
constexpr DLLM_HOST_DEVICE uint64_t k_major_descriptor(uint32_t panels) {
  return matrix_descriptor(panels, 16, kPanelAlignment);
}
// The same descriptor moved on by `step` products along the sum. Operands of one instruction lie in one
// panel.
constexpr DLLM_HOST_DEVICE uint64_t k_major_step(uint64_t descriptor, int step, int panel_bytes) {
  constexpr int kSteps = kPanelColumns / kWgmmaDepth;
  return descriptor + (step / kSteps * panel_bytes + step % kSteps * kWgmmaDepth * 2) / 16;
}

// Rows are what the sum runs over; result columns (or rows) run along them, 64 to a panel.
constexpr DLLM_HOST_DEVICE uint64_t mn_major_descriptor(uint32_t panels, int panel_bytes) {
  return matrix_descriptor(panels, panel_bytes, kPanelAlignment);
}
constexpr DLLM_HOST_DEVICE uint64_t mn_major_step(uint64_t descriptor, int step) {
  return descriptor + step * kWgmmaDepth * kPanelRowBytes / 16;
}

// ---- what an instruction makes of it: also what a test can check
// Byte address of element (i along the result, k along the sum) of the operand that `descriptor` names; k
// < 16.
constexpr DLLM_HOST_DEVICE uint32_t element_address(uint64_t descriptor, Major major, int i, int k) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) * 16;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) * 16;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) * 16;
  const uint32_t address = major == Major::k ? start + i / 8 * stride + i % 8 * kPanelRowBytes + k * 2
                                             : start + i / kPanelColumns * leading + i % kPanelColumns * 2 +
                                                   k / 8 * stride + k % 8 * kPanelRowBytes;
  return address ^ (address >> 3 & 0x70);  // the permutation follows the address bits, not the row's number
}

}  // namespace dllm::cuda
