// Moves rows of block-causal decoding to their next step (core/advance.h).
#pragma once

#include <vector>

#include "core/advance.h"

namespace dllm::cpu {

// Where the rows are after the step; writes nothing.
std::vector<BlockRow> advanced_rows(const AdvanceParams& p);

void store_rows(const AdvanceParams& p, const std::vector<BlockRow>& rows);

}  // namespace dllm::cpu
