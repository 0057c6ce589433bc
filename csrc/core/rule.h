// Acceptance rules as data: their names, what they need, their numbers. core/acceptance.h says what they
// accept.
#pragma once

#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string_view>

#include "core/host_device.h"

namespace dllm {

enum class RuleName : int {
  quota,
  threshold,
  factor,
  quota_or_threshold,
  entropy_bound,
  bernoulli,
  confident_stable,
  edit
};

enum class Confidence : int { prob, margin, entropy, random };
constexpr const char* kConfidenceNames[] = {"prob", "margin", "entropy", "random"};

// What a rule is called, what it needs besides the statistics and the canvas, and its numbers.
enum class Needs : int { nothing, quota, step, stability };
struct RuleParameter {
  const char* name = nullptr;
  double least = -HUGE_VAL, most = HUGE_VAL;
  bool whole = false;
};
struct RuleSignature {
  const char* name;
  Needs needs;
  RuleParameter parameters[3];  // entries without a name are unused
};
constexpr double kMostSteps = std::numeric_limits<int32_t>::max();
constexpr RuleSignature kRules[] = {
    {"quota", Needs::quota, {}},
    {"threshold", Needs::nothing, {{"threshold"}}},
    {"factor", Needs::nothing, {{"factor"}}},
    {"quota_or_threshold", Needs::quota, {{"threshold"}}},
    {"entropy_bound", Needs::nothing, {{"entropy_bound"}}},
    {"bernoulli", Needs::step, {{"steps", 1, kMostSteps, true}, {"eps", 0, 1}}},
    {"confident_stable",
     Needs::stability,
     {{"threshold"}, {"kl_threshold"}, {"stable_steps", 1, kMostSteps, true}}},
    {"edit", Needs::nothing, {{"threshold"}, {"edit_threshold"}}},
};

// Is kRules[rule] the row of this name?
constexpr bool is_row(RuleName rule, std::string_view name) {
  return kRules[static_cast<int>(rule)].name == name;
}
static_assert(is_row(RuleName::quota, "quota") && is_row(RuleName::threshold, "threshold") &&
              is_row(RuleName::factor, "factor") &&
              is_row(RuleName::quota_or_threshold, "quota_or_threshold") &&
              is_row(RuleName::entropy_bound, "entropy_bound") && is_row(RuleName::bernoulli, "bernoulli") &&
              is_row(RuleName::confident_stable, "confident_stable") && is_row(RuleName::edit, "edit") &&
              std::size(kRules) == static_cast<int>(RuleName::edit) + 1);

struct Rule {
  RuleName name;
  double parameters[3];  // in the order of kRules; read them by name
  bool strict;           // > in place of ≥
  Confidence confidence;
  double alg_temp;  // > 0: draw in place of rank

  DLLM_HOST_DEVICE double threshold() const { return parameters[0]; }
  DLLM_HOST_DEVICE double factor() const { return parameters[0]; }
  DLLM_HOST_DEVICE double entropy_bound() const { return parameters[0]; }
  DLLM_HOST_DEVICE double steps() const { return parameters[0]; }
  DLLM_HOST_DEVICE double eps() const { return parameters[1]; }
  DLLM_HOST_DEVICE double kl_threshold() const { return parameters[1]; }
  DLLM_HOST_DEVICE double stable_steps() const { return parameters[2]; }
  DLLM_HOST_DEVICE double edit_threshold() const { return parameters[1]; }
};

// Does kRules call parameter `index` of this rule by the name that the accessors give it?
constexpr bool is_called(RuleName rule, int index, std::string_view name) {
  return kRules[static_cast<int>(rule)].parameters[index].name == name;
}
static_assert(is_called(RuleName::threshold, 0, "threshold") && is_called(RuleName::factor, 0, "factor") &&
              is_called(RuleName::quota_or_threshold, 0, "threshold") &&
              is_called(RuleName::entropy_bound, 0, "entropy_bound") &&
              is_called(RuleName::bernoulli, 0, "steps") && is_called(RuleName::bernoulli, 1, "eps") &&
              is_called(RuleName::confident_stable, 0, "threshold") &&
              is_called(RuleName::confident_stable, 1, "kl_threshold") &&
              is_called(RuleName::confident_stable, 2, "stable_steps") &&
              is_called(RuleName::edit, 0, "threshold") && is_called(RuleName::edit, 1, "edit_threshold"));

}  // namespace dllm
