// Adds the noise of csrc/core/gumbel.h to a row of logits.
#pragma once

#include <cstdint>

namespace dllm::cpu::DLLM_ISA {

// scores[i] = x[i] + temperature · (Gumbel noise of token id first + i) for i < count, a multiple of 64.
// `first` is a multiple of 4; noise_id: sequence, position, step.
void add_gumbel_noise(uint64_t seed, const int32_t* noise_id, float temperature, int32_t first, int count,
                      const float* x, float* scores);

}  // namespace dllm::cpu::DLLM_ISA
