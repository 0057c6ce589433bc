// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random words as a
// pure function of key and counter, so a draw depends on nothing but what it is drawn for.
//
// Noise of vocabulary id v: counter (v div 4, position, step, sequence), lane v mod 4, key = seed.
// Draws of a whole candidate have no vocabulary id; they use counter words that no v div 4 reaches.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace dllm {

struct Philox {
  static constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  static constexpr int kRounds = 10;
};

// First counter word of the draws made once per candidate: `random` confidence, alg_temp's noise, and
// whether rule bernoulli takes it.
constexpr uint32_t kRandomConfidenceDraw = 0xFFFFFFFF;
constexpr uint32_t kPositionDraw = 0xFFFFFFFE;
constexpr uint32_t kUnmaskDraw = 0xFFFFFFFD;

struct RandomWords {
  uint32_t word[4];
};

DLLM_HOST_DEVICE RandomWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < Philox::kRounds; round++) {
    const uint64_t product0 = static_cast<uint64_t>(Philox::kMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(Philox::kMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += Philox::kWeyl0;
    k1 += Philox::kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace dllm
