// Shape of the token_divergence kernel; host and device read the same numbers.
#pragma once

namespace dllm::cuda {

constexpr int kDivergenceThreads = 256;  // one CTA works on one row
constexpr int kDivergenceWarps = kDivergenceThreads / 32;

}  // namespace dllm::cuda
