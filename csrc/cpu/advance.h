// Moves rows of block-causal decoding to their next step (core/advance.h).
#pragma once

#include "core/advance.h"

namespace dllm::cpu { void advance(const AdvanceParams& p); }  // namespace dllm::cpu
