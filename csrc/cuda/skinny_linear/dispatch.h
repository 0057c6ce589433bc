// Which kernel of skinny_linear takes a problem.
#pragma once

#include <stdint.h>

#include "core/params.h"
#include "cuda/sm90/weight_stream.h"

namespace dllm::cuda {

constexpr int kGroupInputs = 64;  // of a weight in bytes: groups are multiples of it

enum class LinearKernel { any_types, sm80, sm90, cutlass };

inline bool at_16_bytes(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// CUTLASS multiplies by weights in bytes: e4m3 with x in e4m3 too, and int8 with more rows of x than the
// kernel for Hopper takes at once. Its copies read and write rows at multiples of 16 bytes.
inline bool cutlass_fits(const SkinnyLinearParams& p) {
  return p.scales && (p.e4m3 || p.rows > sm90::kMaxStreamRows) && p.groups == 1 &&
         p.x_type != DType::float32 && p.inputs > 0 && p.inputs % 16 == 0 && p.weight_stride >= p.inputs &&
         p.weight_stride % 16 == 0 && p.weight_stride < int64_t{1} << 39 && p.outputs % 8 == 0 &&
         (!p.bias || p.bias_type == p.x_type) && at_16_bytes(p.x) && at_16_bytes(p.weight) &&
         at_16_bytes(p.out);
}

// On a GPU of this compute capability, 90 for 9.0. Tensor cores multiply 16-bit values, or bytes of a weight
// that are widened to them, from rows that begin at multiples of 16 bytes. has_cutlass: the library was built
// with it.
inline LinearKernel linear_kernel(const SkinnyLinearParams& p, int capability, bool has_cutlass) {
  if (capability == 90 && has_cutlass && cutlass_fits(p)) return LinearKernel::cutlass;
  const int together = p.scales ? 16 : 8;  // elements of the weight in 16 bytes
  if (p.x_type == DType::float32 || p.inputs == 0 || p.inputs % together || p.weight_stride % together ||
      (p.groups > 1 && p.inputs / p.groups % kGroupInputs) || !at_16_bytes(p.x) || !at_16_bytes(p.weight) ||
      (!p.scales && p.weight_type != p.x_type))
    return LinearKernel::any_types;
  const int of_map = p.scales ? 2 : 1;  // elements of the weight in a 16-bit one, as which TMA fetches them
  const bool streams =
      !p.e4m3 && sm90::can_stream(p.x, p.weight, p.x_type, p.inputs / of_map, p.weight_stride / of_map);
  return capability == 90 && streams ? LinearKernel::sm90 : LinearKernel::sm80;
}

}  // namespace dllm::cuda
