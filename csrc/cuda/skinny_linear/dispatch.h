// Which kernel of skinny_linear takes a problem.
#pragma once

#include <stdint.h>

#include "core/params.h"
#include "cuda/sm90/weight_stream.h"

namespace dllm::cuda {

constexpr int kGroupInputs = 64;  // of a weight in bytes: groups are multiples of it

enum class LinearKernel { any_types, sm80, sm90 };

// On a GPU of this compute capability, 90 for 9.0. Tensor cores multiply 16-bit values, or bytes of a weight
// that are widened to them, from rows that begin at multiples of 16 bytes.
inline LinearKernel linear_kernel(const SkinnyLinearParams& p, int capability) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const int together = p.scales ? 16 : 8;  // elements of the weight in 16 bytes
  if (p.x_type == DType::float32 || p.inputs == 0 || p.inputs % together || p.weight_stride % together ||
      (p.groups > 1 && p.inputs / p.groups % kGroupInputs) || !aligned(p.x) || !aligned(p.weight) ||
      (!p.scales && p.weight_type != p.x_type))
    return LinearKernel::any_types;
  const int of_map = p.scales ? 2 : 1;  // elements of the weight in a 16-bit one, as which TMA fetches them
  const bool streams = sm90::can_stream(p.x, p.weight, p.x_type, p.inputs / of_map, p.weight_stride / of_map);
  return capability == 90 && streams ? LinearKernel::sm90 : LinearKernel::sm80;
}

}  // namespace dllm::cuda
