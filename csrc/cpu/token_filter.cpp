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

// A search by halves for the last id that top-p keeps: only the half that holds it is looked at again.
TokenCut TokenFilter::cut() {
  keep_highest();
  const auto higher = [](const Candidate& a, const Candidate& b) {
    return a.x > b.x || (a.x == b.x && a.id < b.id);
  };
  auto begin = candidates_.begin(), end = candidates_.end();
  double before = 0;
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, higher);
    double mass = before;
    for (auto candidate = begin; candidate < middle; candidate++) mass += std::exp(candidate->x - max_);
    if (mass > mass_) {
      end = middle;
    } else {
      begin = middle;
      before = mass;
    }
  }
  return begin == end ? TokenCut{} : TokenCut{begin->x, end == candidates_.end() ? INT32_MAX : begin->id};
}

}  // namespace dllm::cpu
