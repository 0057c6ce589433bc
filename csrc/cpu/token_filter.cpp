#include "cpu/token_filter.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace dllm::cpu {

TokenFilter::TokenFilter(double top_p, int32_t top_k, double max, double sum, int32_t vocabulary)
    : mass_(top_p < 1 ? top_p * sum : HUGE_VAL),
      max_(max),
      top_k_(top_k),
      limit_(4096 + 2 * top_k_),
      bound_(-FLT_MAX) {
  // Ids of less than (1 − top_p) / vocabulary hold less than 1 − top_p together, so the cut is above them;
  // half of that leaves room for the rounding of sum.
  const double lowest = max + std::log((1 - top_p) * sum / vocabulary / 2);
  if (lowest > bound_) bound_ = static_cast<float>(lowest);
}

void TokenFilter::add(const float* x, int count, int32_t first) {
  for (int i = 0; i < count; i++)
    if (x[i] >= bound_) candidates_.push_back({x[i], first + i});
  if (candidates_.size() > limit_) keep_highest();
}

// Drops what is below the k-th candidate.
void TokenFilter::keep_highest() {
  if (candidates_.size() <= top_k_) return;
  const auto kth = candidates_.begin() + (top_k_ - 1);
  std::nth_element(candidates_.begin(), kth, candidates_.end(),
                   [](const Candidate& a, const Candidate& b) { return a.x > b.x; });
  bound_ = kth->x;
  candidates_.erase(std::remove_if(kth, candidates_.end(), [&](const Candidate& c) { return c.x < bound_; }),
                    candidates_.end());
  limit_ = 2 * candidates_.size() + 4096;
}

Cut TokenFilter::cut() {
  keep_highest();
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return a.x > b.x || (a.x == b.x && a.id < b.id); });
  double before = 0;
  for (size_t i = 0; i + 1 < candidates_.size(); i++) {
    before += std::exp(candidates_[i].x - max_);
    if (before > mass_) return {candidates_[i].x, candidates_[i].id};
  }
  return candidates_.empty() ? Cut{} : Cut{candidates_.back().x};
}

}  // namespace dllm::cpu
