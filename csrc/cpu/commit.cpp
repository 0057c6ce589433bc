#include "cpu/commit.h"

#include <algorithm>
#include <vector>

namespace dllm::cpu {
namespace {

template <class Real, class Id>
void commit_rows(const CommitParams& p, int64_t begin, int64_t end) {
  struct Listed {
    Candidate<Real> candidate;
    int64_t index;  // of the statistics
  };
  const auto* prob = static_cast<const Real*>(p.prob);
  const auto* margin = static_cast<const Real*>(p.margin);
  const auto* entropy = static_cast<const Real*>(p.entropy);
  std::vector<Listed> order;
  for (int64_t b = begin; b < end; b++) {
    Id* canvas = static_cast<Id*>(p.canvas) + b * p.canvas_stride;
    DrawId draw{p.seed, p.sequence_ids ? p.sequence_ids[b] : static_cast<int32_t>(b), 0,
                p.step ? p.step[b] : 0};
    order.clear();
    int masks = 0;
    for (int64_t i = b * p.candidates; i < (b + 1) * p.candidates; i++) {
      p.accepted[i] = false;
      if (p.positions[i] < 0 || canvas[p.positions[i]] != p.mask_id) continue;
      masks++;
      if (p.token[i] == p.mask_id) continue;
      draw.position = p.positions[i];
      order.push_back({make_candidate(p.rule, prob[i], margin[i], entropy[i], draw), i});
    }
    std::sort(order.begin(), order.end(),
              [](const Listed& a, const Listed& b) { return precedes(a.candidate, b.candidate); });
    int changed = 0;
    Real entropy_before = 0;
    for (const auto& [candidate, i] : order) {
      if (!keeps(p.rule, changed, candidate.confidence, entropy_before, p.quota ? p.quota[b] : 0)) break;
      entropy_before += entropy[i];
      canvas[candidate.position] = static_cast<Id>(p.token[i]);
      p.accepted[i] = true;
      changed++;
    }
    if (p.progress) {
      p.progress[2 * b] = masks - changed;
      p.progress[2 * b + 1] = changed;
    }
  }
}

}  // namespace

void commit(const CommitParams& p, int64_t begin, int64_t end) {
  if (p.float64)
    p.canvas_is_int64 ? commit_rows<double, int64_t>(p, begin, end)
                      : commit_rows<double, int32_t>(p, begin, end);
  else
    p.canvas_is_int64 ? commit_rows<float, int64_t>(p, begin, end)
                      : commit_rows<float, int32_t>(p, begin, end);
}

}  // namespace dllm::cpu
