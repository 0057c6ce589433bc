// Acceptance rules: which candidates of a row a denoising step commits. Written once, for host and device.
//
// A candidate is a listed position that still holds the mask and whose proposal is not the mask token.
// Candidates are ordered by a key, the surest first, ties to the lower position; a rule accepts them in
// this order until the first one that it does not keep. So a rule is one line in `keeps`, and for rules
// that judge each candidate by itself one in `chooses`: those they choose come first. Listed positions that
// hold no mask are no candidates; `edits` says whether they change.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/gumbel.h"
#include "core/host_device.h"
#include "core/philox.h"
#include "core/rule.h"

namespace dllm {

// Real: the type of the statistics, float or double; comparisons are made in it, as in torch.
template <class Real>
struct Candidate {
  Real confidence;
  Real key;
  int32_t position;
  bool chosen;
};

template <class Real>
DLLM_HOST_DEVICE bool precedes(const Candidate<Real>& a, const Candidate<Real>& b) {
  return a.key > b.key || (a.key == b.key && a.position < b.position);
}

// Where the draws of a candidate come from.
struct DrawId {
  uint64_t seed;
  int32_t sequence, position, step;
  DLLM_HOST_DEVICE uint32_t word(uint32_t draw) const {
    return philox(seed, draw, static_cast<uint32_t>(position), static_cast<uint32_t>(step),
                  static_cast<uint32_t>(sequence))
        .word[0];
  }
};

template <class Real>
DLLM_HOST_DEVICE bool reaches(const Rule& rule, Real value, double bound) {
  return rule.strict ? value > Real(bound) : value >= Real(bound);
}

// Rule bernoulli: with probability 1 − s/t, where t and s are numbers `step` and `step + 1` of
// linspace(1, eps, steps + 1); in the last step always. Written without a product that a sum could absorb,
// so that host and device agree to the bit.
DLLM_HOST_DEVICE bool drawn_by_time(const Rule& rule, const DrawId& id) {
  const double steps = rule.steps(), eps = rule.eps();
  if (id.step >= steps - 1) return true;
  const double probability = 1 / (steps / (1 - eps) - id.step);
  return id.word(kUnmaskDraw) + 0.5 < probability * 0x1p32;
}

// The counter of a masked position: steps in a row whose divergence lay below the rule's bound. That of a
// first step, infinite or NaN, does not.
template <class Real>
DLLM_HOST_DEVICE int32_t stable_steps(const Rule& rule, Real divergence, int32_t before) {
  if (!(divergence < Real(rule.kl_threshold()))) return 0;
  return before < std::numeric_limits<int32_t>::max() ? before + 1 : before;
}

template <class Real>
DLLM_HOST_DEVICE bool chooses(const Rule& rule, Real confidence, int32_t stable, const DrawId& id) {
  if (rule.name == RuleName::bernoulli) return drawn_by_time(rule, id);
  if (rule.name == RuleName::confident_stable)
    return stable >= rule.stable_steps() && reaches(rule, confidence, rule.threshold());
  return false;
}

// `entropy` in nats: its confidence is −entropy. NaN counts as the least sure. `stable`: the counter above.
template <class Real>
DLLM_HOST_DEVICE Candidate<Real> make_candidate(const Rule& rule, Real prob, Real margin, Real entropy,
                                                int32_t stable, const DrawId& id) {
  Real confidence = prob;
  if (rule.confidence == Confidence::margin) confidence = margin;
  if (rule.confidence == Confidence::entropy) confidence = -entropy;
  if (rule.confidence == Confidence::random)
    confidence = uniform<OneLane>(id.word(kRandomConfidenceDraw)).value;
  if (!(confidence == confidence)) confidence = -HUGE_VALF;
  const bool chosen = chooses(rule, confidence, stable, id);
  Real key = confidence;
  // Drawing without replacement from softmax(confidence / alg_temp) is sorting by it plus Gumbel noise.
  if (rule.alg_temp > 0)
    key = Real(confidence / rule.alg_temp) + Real(gumbel<OneLane>(id.word(kPositionDraw)).value);
  // Infinity is the key of chosen candidates alone: they come first, by position, and all others below it
  // stay behind, also where the quotient above overflows. For example, confident_stable with threshold 0.9
  // and stable_steps 2:
  //     position            3      5      8      9
  //     prob              0.91   0.97   0.95   0.40
  //     stable               2      0      3      4
  //     key                inf   0.97    inf   0.40
  //     rank                 0      2      1      3
  // 3 and 8 are kept; 5 was not chosen, which ends the accepted ones before 9 is looked at.
  constexpr Real largest = std::numeric_limits<Real>::max();
  if (chosen || key > largest) key = chosen ? Real(HUGE_VALF) : largest;
  return {confidence, key, id.position, chosen};
}

// rank counts from 0; entropy_before is the sum of the entropies of the candidates that precede this one.
template <class Real>
DLLM_HOST_DEVICE bool keeps(const Rule& rule, int rank, const Candidate<Real>& candidate, Real entropy_before,
                            int quota) {
  switch (rule.name) {
    case RuleName::quota: return rank < quota;
    case RuleName::threshold:
    case RuleName::edit: return rank == 0 || reaches(rule, candidate.confidence, rule.threshold());
    case RuleName::factor:
      return rank == 0 || reaches(rule, candidate.confidence, 1 - rule.factor() / (rank + 2));
    case RuleName::quota_or_threshold:
      return rank < quota || reaches(rule, candidate.confidence, rule.threshold());
    case RuleName::entropy_bound: return rank == 0 || entropy_before <= Real(rule.entropy_bound());
    case RuleName::bernoulli: return candidate.chosen;
    case RuleName::confident_stable: return rank == 0 || candidate.chosen;
  }
  return false;
}

// Whether a proposal that differs from the token a listed position holds takes its place.
template <class Real>
DLLM_HOST_DEVICE bool edits(const Rule& rule, Real prob) {
  return rule.name == RuleName::edit && reaches(rule, prob, rule.edit_threshold());
}

}  // namespace dllm
