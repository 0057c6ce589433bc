// Acceptance rules: which candidates of a row a denoising step commits. Written once, for host and device.
//
// A candidate is a listed position that still holds the mask and whose proposal is not the mask token.
// Candidates are ordered by a key, the surest first, ties to the lower position; a rule accepts them in
// this order until the first one that it does not keep. So a rule is one line in `keeps`.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/gumbel.h"
#include "core/host_device.h"
#include "core/philox.h"

namespace dllm {

enum class RuleName : int { quota, threshold, factor, quota_or_threshold, entropy_bound };
constexpr const char* kRuleNames[] = {"quota", "threshold", "factor", "quota_or_threshold", "entropy_bound"};

enum class Confidence : int { prob, margin, entropy, random };
constexpr const char* kConfidenceNames[] = {"prob", "margin", "entropy", "random"};

struct Rule {
  RuleName name;
  double parameter;  // threshold τ, factor f, bound γ; unused by quota
  bool strict;       // > in place of ≥
  Confidence confidence;
  double alg_temp;  // > 0: draw in place of rank
};

// Real: the type of the statistics, float or double; comparisons are made in it, as in torch.
template <class Real>
struct Candidate {
  Real confidence;
  Real key;
  int32_t position;
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

// `entropy` in nats: its confidence is −entropy. NaN counts as the least sure.
template <class Real>
DLLM_HOST_DEVICE Candidate<Real> make_candidate(const Rule& rule, Real prob, Real margin, Real entropy,
                                                const DrawId& id) {
  Real confidence = prob;
  if (rule.confidence == Confidence::margin) confidence = margin;
  if (rule.confidence == Confidence::entropy) confidence = -entropy;
  if (rule.confidence == Confidence::random)
    confidence = uniform<OneLane>(id.word(kRandomConfidenceDraw)).value;
  if (!(confidence == confidence)) confidence = -HUGE_VALF;
  // Drawing without replacement from softmax(confidence / alg_temp) is sorting by it plus Gumbel noise.
  const Real key = rule.alg_temp > 0 ? confidence / Real(rule.alg_temp) +
                                           Real(gumbel<OneLane>(id.word(kPositionDraw)).value)
                                     : confidence;
  return {confidence, key, id.position};
}

// rank counts from 0; entropy_before is the sum of the entropies of the candidates that precede this one.
template <class Real>
DLLM_HOST_DEVICE bool keeps(const Rule& rule, int rank, Real confidence, Real entropy_before, int quota) {
  const auto reaches = [&](double bound) {
    return rule.strict ? confidence > Real(bound) : confidence >= Real(bound);
  };
  switch (rule.name) {
    case RuleName::quota: return rank < quota;
    case RuleName::threshold: return rank == 0 || reaches(rule.parameter);
    case RuleName::factor: return rank == 0 || reaches(1 - rule.parameter / (rank + 2));
    case RuleName::quota_or_threshold: return rank < quota || reaches(rule.parameter);
    case RuleName::entropy_bound: return rank == 0 || entropy_before <= Real(rule.parameter);
  }
  return false;
}

}  // namespace dllm
