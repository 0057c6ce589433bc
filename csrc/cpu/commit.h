// Accepts proposals by a rule (core/acceptance.h) and writes them into the canvas.
#pragma once

#include "core/params.h"

namespace dllm::cpu {

// Rows [begin, end) of the batch; positions are given, and checked.
void commit(const CommitParams& p, int64_t begin, int64_t end);

}  // namespace dllm::cpu
