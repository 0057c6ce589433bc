#include "cpu/commit.h"

#include <algorithm>
#include <vector>

#include "core/acceptance.h"

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
  const auto* divergence = static_cast<const Real*>(p.divergence);
  std::vector<Listed> order;
  for (int64_t b = begin; b < end; b++) {
    Id* canvas = static_cast<Id*>(p.canvas) + b * p.canvas_stride;
    int32_t* state = p.state ? p.state + b * p.state_stride : nullptr;
    DrawId draw{p.seed, p.sequence_ids ? p.sequence_ids[b] : static_cast<int32_t>(b), 0,
                p.step ? p.step[b] : 0};
    const auto write = [&](int32_t position, int64_t i) {
      canvas[position] = static_cast<Id>(p.token[i]);
      p.accepted[i] = true;
    };
    order.clear();
    int masks = 0, edited = 0;
    for (int64_t i = b * p.candidates; i < (b + 1) * p.candidates; i++) {
      const int32_t position = p.positions[i];
      p.accepted[i] = false;
      if (position < 0) continue;
      const bool masked = canvas[position] == p.mask_id, proposed = p.token[i] != p.mask_id;
      masks += masked;
      if (masked && state) state[position] = stable_steps(p.rule, divergence[i], state[position]);
      if (masked && proposed) {
        draw.position = position;
        const int32_t stable = state ? state[position] : 0;
        order.push_back({make_candidate(p.rule, prob[i], margin[i], entropy[i], stable, draw), i});
      } else if (proposed && canvas[position] != p.token[i] && edits(p.rule, prob[i])) {
        write(position, i);
        edited++;
      }
    }
    std::sort(order.begin(), order.end(),
              [](const Listed& a, const Listed& b) { return precedes(a.candidate, b.candidate); });
    int unmasked = 0;
    Real entropy_before = 0;
    for (const auto& [candidate, i] : order) {
      if (!keeps(p.rule, unmasked, candidate, entropy_before, p.quota ? p.quota[b] : 0)) break;
      entropy_before += entropy[i];
      write(candidate.position, i);
      unmasked++;
    }
    if (p.progress) {
      p.progress[2 * b] = masks - unmasked;
      p.progress[2 * b + 1] = unmasked + edited;
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
