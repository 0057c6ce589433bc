// Top-p and top-k over one row: finds where the kept ids end without sorting the whole row. Compiled once:
// the standard library's sorts must not be instantiated for one instruction set and shared with another.
#pragma once

#include <cstdint>
#include <vector>

#include "core/params.h"

namespace dllm::cpu {

class TokenFilter {
 public:
  // max and sum: of the row's x, Σ exp(x − max).
  TokenFilter(double top_p, int32_t top_k, double max, double sum, int32_t vocabulary);

  // x of ids first, first + 1, …; −inf is never kept.
  void add(const float* x, int count, int32_t first);

  // Top-p keeps ids in descending x (ties: ascending id) while the mass before them is at most top_p of the
  // whole, so the first always; then top-k keeps what is not below the k-th of these.
  TokenCut cut();

 private:
  struct Candidate {
    float x;
    int32_t id;
  };
  void keep_highest();

  double mass_, max_;
  size_t top_k_, limit_;
  float bound_;  // candidates are not below it
  std::vector<Candidate> candidates_;
};

}  // namespace dllm::cpu
